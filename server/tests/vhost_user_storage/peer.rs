//! A vhost-user-blk server on the crate `vhost-user-backend`, which shares nothing with the one that is tested.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use common::eventually;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::common;
use common::{
    DISCARD, FLUSH, INDIRECT, PROTOCOL, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, VERSION_1,
    WRITE_ZEROES,
};

type Mem = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Mem>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// Feature bits (virtio 1.3, 5.2.3).
pub const SIZE_MAX: u64 = 1 << 1;
pub const SEG_MAX: u64 = 1 << 2;
pub const RO: u64 = 1 << 5;
pub const BLK_SIZE: u64 = 1 << 6;

/// What the server is told to do with requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Serve,
    /// Several at a time, the last first.
    Backwards,
    /// Takes them, and answers none until the mood is another.
    Hold,
    /// Does them, and answers none: what it had is lost with the connection.
    DoWithoutAnswer,
    /// Returns a chain that it does not have.
    WrongHead,
    /// Returns a chain twice.
    Twice,
    /// Answers with a status that there is not.
    WrongStatus,
    /// Says that it has used more than it was given.
    WrongIndex,
    /// Fails all of them.
    Fail,
}

/// The server as a test wants it.
pub struct Knobs {
    pub features: u64,
    pub protocol: Protocol,
    pub block_bytes: u32,
    pub size_max: u32,
    pub seg_max: u32,
    pub queues: u16,
    pub mood: Mood,
    pub data: Vec<u8>,
    /// Requests done, by type.
    pub log: Vec<(u32, u64, usize)>,
    pub held: Vec<(Vring, u16)>,
    /// How long it takes to map memory, once.
    pub mapping_takes: Option<Duration>,
    /// Regions that it has mapped.
    pub regions: usize,
    /// Regions that it takes.
    pub max_regions: usize,
    /// Connections of which a client set features.
    pub connections: usize,
}

impl Default for Knobs {
    fn default() -> Self {
        Self {
            features: VERSION_1 | PROTOCOL | INDIRECT | FLUSH | DISCARD | WRITE_ZEROES | SEG_MAX,
            protocol: Protocol::CONFIG
                | Protocol::MQ
                | Protocol::REPLY_ACK
                | Protocol::CONFIGURE_MEM_SLOTS
                | Protocol::BACKEND_REQ,
            block_bytes: 512,
            size_max: 65536,
            seg_max: 126,
            queues: 2,
            mood: Mood::Serve,
            data: vec![0; 4 << 20],
            log: Vec::new(),
            held: Vec::new(),
            mapping_takes: None,
            regions: 0,
            max_regions: usize::MAX,
            connections: 0,
        }
    }
}

/// What the crate calls.
#[derive(Clone)]
struct Disk {
    knobs: Arc<Mutex<Knobs>>,
    memory: Arc<Mutex<Option<Mem>>>,
    /// Ends the threads of a connection.
    exit: Arc<(EventConsumer, EventNotifier)>,
}

/// A server at a socket.
pub struct Peer {
    knobs: Arc<Mutex<Knobs>>,
    socket: PathBuf,
    connection: Arc<Mutex<Option<ShutdownHandle>>>,
    away: Arc<AtomicBool>,
}

impl Peer {
    /// Serves clients one after the other, as it is told.
    pub fn start(socket: &Path, knobs: Knobs) -> Self {
        let this = Self {
            knobs: Arc::new(Mutex::new(knobs)),
            socket: socket.to_owned(),
            connection: Arc::default(),
            away: Arc::default(),
        };
        let (knobs, away) = (Arc::clone(&this.knobs), Arc::clone(&this.away));
        let connection = Arc::clone(&this.connection);
        let mut listener = Listener::new(socket, true).unwrap();
        // It ends with the process.
        thread::spawn(move || {
            loop {
                let (consumer, notifier) =
                    new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
                let memory = Mem::new(GuestMemoryMmap::new());
                let disk = Disk {
                    knobs: Arc::clone(&knobs),
                    memory: Arc::default(),
                    exit: Arc::new((consumer, notifier)),
                };
                let mut daemon = VhostUserDaemon::new("peer".into(), disk, memory).unwrap();
                daemon.start(&mut listener).unwrap();
                if away.load(Ordering::SeqCst) {
                    // The connection ends with the daemon.
                    drop(daemon);
                    thread::sleep(Duration::from_millis(5));
                    continue;
                }
                *connection.lock().unwrap() = daemon.shutdown_handle();
                let _ = daemon.wait();
                for handler in daemon.get_epoll_handlers() {
                    handler.send_exit_event();
                }
                let mut knobs = knobs.lock().unwrap();
                knobs.held.clear();
            }
        });
        this
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn knobs(&self) -> MutexGuard<'_, Knobs> {
        self.knobs.lock().unwrap()
    }

    pub fn set_mood(&self, mood: Mood) {
        self.knobs().mood = mood;
    }

    /// Waits until so many requests are held.
    pub fn wait_held(&self, count: usize) {
        eventually("requests are held", || self.knobs().held.len() == count);
    }

    /// Answers what is held, the last first.
    pub fn release(&self) {
        let held = std::mem::take(&mut self.knobs().held);
        for (vring, head) in held.into_iter().rev() {
            vring.add_used(head, 1).unwrap();
            vring.signal_used_queue().unwrap();
        }
    }

    /// Hangs up on the client, and on each that comes, until it is back.
    pub fn leave(&self) {
        self.away.store(true, Ordering::SeqCst);
        self.hang_up();
    }

    pub fn come_back(&self) {
        self.away.store(false, Ordering::SeqCst);
    }

    /// Hangs up on the client; it may come back at once.
    pub fn hang_up(&self) {
        if let Some(connection) = self.connection.lock().unwrap().take() {
            connection.shutdown();
        }
    }

    /// How many requests of a type were done.
    pub fn count(&self, kind: u32) -> usize {
        self.knobs()
            .log
            .iter()
            .filter(|done| done.0 == kind)
            .count()
    }
}

impl Knobs {
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.data.len() as u64 / 512).to_le_bytes());
        put(8, &self.size_max.to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        put(20, &self.block_bytes.to_le_bytes());
        put(34, &self.queues.to_le_bytes());
        put(36, &1024u32.to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &8u32.to_le_bytes());
        put(48, &1024u32.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        config
    }

    /// Does a request: its status, and where that is to be written.
    fn serve(&mut self, memory: &GuestMemoryMmap, chain: Chain) -> (u8, GuestAddress) {
        let parts: Vec<_> = chain.collect();
        let (header, status) = (parts[0], parts[parts.len() - 1]);
        assert!(!header.is_write_only() && header.len() == 16, "{parts:?}");
        assert!(status.is_write_only() && status.len() == 1, "{parts:?}");
        let kind: u32 = memory.read_obj(header.addr()).unwrap();
        let at = GuestAddress(header.addr().0 + 8);
        let sector: u64 = memory.read_obj(at).unwrap();
        let data = &parts[1..parts.len() - 1];
        assert!(
            data.len() <= self.seg_max as usize,
            "{} segments",
            data.len()
        );
        let mut place = usize::try_from(sector).unwrap() * 512;
        let begin = place;
        for part in data {
            assert!(part.len() <= self.size_max || self.features & SIZE_MAX == 0);
            let len = part.len() as usize;
            match kind {
                T_IN => {
                    assert!(part.is_write_only());
                    memory
                        .write_slice(&self.data[place..place + len], part.addr())
                        .unwrap();
                }
                T_OUT => {
                    assert!(!part.is_write_only());
                    memory
                        .read_slice(&mut self.data[place..place + len], part.addr())
                        .unwrap();
                }
                T_DISCARD | T_WRITE_ZEROES => {
                    let first: u64 = memory.read_obj(part.addr()).unwrap();
                    let at = GuestAddress(part.addr().0 + 8);
                    let sectors: u32 = memory.read_obj(at).unwrap();
                    assert!((1..=1024).contains(&sectors));
                    let first = usize::try_from(first).unwrap() * 512;
                    self.data[first..first + sectors as usize * 512].fill(0);
                }
                _ => panic!("request {kind}"),
            }
            place += len;
        }
        assert!(kind != T_FLUSH || data.is_empty());
        self.log.push((kind, sector, place - begin));
        (0, status.addr())
    }
}

impl VhostUserBackend for Disk {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.knobs.lock().unwrap().queues.into()
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        self.knobs.lock().unwrap().features
    }

    fn protocol_features(&self) -> Protocol {
        self.knobs.lock().unwrap().protocol
    }

    fn acked_features(&self, _: u64) {
        self.knobs.lock().unwrap().connections += 1;
    }

    fn set_event_idx(&self, enabled: bool) {
        assert!(!enabled);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.knobs.lock().unwrap().config();
        config[offset as usize..(offset + size) as usize].to_vec()
    }

    fn update_memory(&self, memory: Mem) -> io::Result<()> {
        let (pause, most) = {
            let mut knobs = self.knobs.lock().unwrap();
            (knobs.mapping_takes.take(), knobs.max_regions)
        };
        if let Some(pause) = pause {
            thread::sleep(pause);
        }
        if memory.memory().num_regions() > most {
            return Err(io::Error::other("too many regions"));
        }
        self.knobs.lock().unwrap().regions = memory.memory().num_regions();
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        let (consumer, notifier) = &*self.exit;
        Some((consumer.try_clone().unwrap(), notifier.try_clone().unwrap()))
    }

    fn handle_event(&self, event: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        let vring = &vrings[usize::from(event)];
        let memory = self.memory.lock().unwrap().clone().unwrap().memory();
        let mut chains = Vec::new();
        {
            let mut state = vring.get_mut();
            let queue = state.get_queue_mut();
            while let Some(chain) = queue.pop_descriptor_chain(memory.clone()) {
                chains.push(chain);
            }
        }
        let mut knobs = self.knobs.lock().unwrap();
        if knobs.mood == Mood::Backwards {
            chains.reverse();
        }
        for chain in chains {
            let head = chain.head_index();
            let mood = knobs.mood;
            let (mut status, status_at) = knobs.serve(&memory, chain);
            match mood {
                Mood::WrongStatus => status = 7,
                Mood::Fail => status = 1,
                _ => {}
            }
            memory.write_obj(status, status_at).unwrap();
            match mood {
                Mood::Hold => {
                    knobs.held.push((vring.clone(), head));
                    continue;
                }
                Mood::DoWithoutAnswer => continue,
                Mood::WrongHead => vring.add_used((head + 1) % 256, 1).unwrap(),
                Mood::Twice => {
                    vring.add_used(head, 1).unwrap();
                    vring.add_used(head, 1).unwrap();
                }
                Mood::WrongIndex => {
                    let mut state = vring.get_mut();
                    for _ in 0..300 {
                        state.add_used(head, 1).unwrap();
                    }
                }
                _ => vring.add_used(head, 1).unwrap(),
            }
            vring.signal_used_queue().unwrap();
        }
        Ok(())
    }
}
