//! A vhost-user client on this machine that keeps requests in flight, checks all of them, and connects again, with its
//! record of chains in flight, whenever its server is gone.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testkit::random::Random;
use testkit::vhost::{
    DATA, Memory, NEXT, OK, T_FLUSH, T_IN, T_OUT, UNTOUCHED, USUAL, Vring, WRITE,
};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// Requests in flight at once.
const SLOTS: u16 = 16;

/// Blocks of the disk that are used, each by one request at a time.
const BLOCKS: usize = 64;

const BLOCK_BYTES: usize = 4096;

const RING_SIZE: u16 = 64;

/// How long a request may take, or a server to come.
const LIMIT: Duration = Duration::from_secs(60);

/// What the client did.
#[derive(Debug, Default)]
pub struct Done {
    pub requests: u64,
    pub connections: u64,
    pub longest_wait: Duration,
}

#[derive(Clone, Copy)]
enum Request {
    Flush,
    Read { block: usize },
    Write { block: usize, generation: u32 },
}

impl Request {
    fn block(self) -> Option<usize> {
        match self {
            Self::Flush => None,
            Self::Read { block } | Self::Write { block, .. } => Some(block),
        }
    }
}

/// The client.
pub struct Client {
    socket: PathBuf,
    random: Random,
    memory: Memory,
    vring: Vring,
    record: Option<(VhostUserInflight, File)>,
    connection: Option<(Frontend, UnixStream)>,
    /// What each block was last written with; zero: nothing.
    generations: [u32; BLOCKS],
    in_flight: [Option<(Request, Instant)>; SLOTS as usize],
    done: Done,
}

impl Client {
    /// A client of this socket, to which nothing was written before.
    pub fn new(socket: &Path, seed: u64) -> Self {
        Self {
            socket: socket.to_owned(),
            random: Random(seed),
            memory: Memory::new(),
            vring: Vring::new(0, RING_SIZE),
            record: None,
            connection: None,
            generations: [0; BLOCKS],
            in_flight: [None; SLOTS as usize],
            done: Done::default(),
        }
    }

    /// Reads and writes until it is over, then waits for what is in flight and leaves.
    pub fn run(&mut self, over: &AtomicBool) -> Result<()> {
        let mut alone_since = Instant::now();
        while !over.load(Ordering::Relaxed) || self.in_flight.iter().any(Option::is_some) {
            if self.connection.is_none() {
                ensure!(alone_since.elapsed() < LIMIT, "no server came");
                // It may die before it has said all.
                if self.connect().is_err() {
                    self.connection = None;
                    thread::sleep(Duration::from_millis(2));
                    continue;
                }
                self.done.connections += 1;
            }
            alone_since = Instant::now();
            if !over.load(Ordering::Relaxed) {
                self.submit()?;
            }
            let (notified, hung_up) = self.wait()?;
            if notified {
                self.vring.call.read()?;
                self.take_answers()?;
            }
            if hung_up {
                self.connection = None;
            }
            let late = self.in_flight.iter().flatten();
            let late = late.filter(|(_, since)| since.elapsed() > LIMIT).count();
            ensure!(late == 0, "{late} requests have no answer");
        }
        self.leave()
    }

    /// What was done.
    pub fn done(&self) -> &Done {
        &self.done
    }

    /// Compares an image with what was written.
    pub fn check_image(&self, image: &Path) -> Result<()> {
        let image = File::open(image)?;
        for (block, &generation) in self.generations.iter().enumerate() {
            let mut bytes = vec![0; BLOCK_BYTES];
            image.read_exact_at(&mut bytes, (block * BLOCK_BYTES) as u64)?;
            ensure!(
                bytes == pattern(block, generation),
                "block {block} is not as it was written last"
            );
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<()> {
        let stream = UnixStream::connect(&self.socket)?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, 0x8000);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let protocol = frontend.get_protocol_features()?;
        frontend.set_protocol_features(protocol)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(offered & USUAL)?;
        frontend.set_mem_table(&[self.memory.region()])?;
        if self.record.is_none() {
            let wanted = VhostUserInflight::new(0, 0, 1, RING_SIZE);
            self.record = Some(frontend.get_inflight_fd(&wanted)?);
        }
        if let Some((told, file)) = &self.record {
            frontend.set_inflight_fd(told, file.as_raw_fd())?;
        }
        let vring = &self.vring;
        frontend.set_vring_num(0, vring.size)?;
        frontend.set_vring_base(0, vring.used_index(&self.memory))?;
        frontend.set_vring_addr(0, &vring.addresses())?;
        frontend.set_vring_kick(0, &vring.kick)?;
        frontend.set_vring_call(0, &vring.call)?;
        frontend.set_vring_err(0, &vring.error)?;
        frontend.set_vring_enable(0, true)?;
        self.connection = Some((frontend, stream));
        // What was offered while there was no server.
        self.vring.kick.write(1)?;
        Ok(())
    }

    fn leave(&mut self) -> Result<()> {
        // If the server has just died the next one finds nothing in flight.
        if let Some((frontend, _)) = self.connection.take() {
            let _base = frontend.get_vring_base(0);
        }
        Ok(())
    }

    /// Fills the free slots with requests.
    fn submit(&mut self) -> Result<()> {
        let old = self.vring.next_available;
        for slot in 0..SLOTS {
            if self.in_flight[usize::from(slot)].is_some() {
                continue;
            }
            let block = self.random.index(BLOCKS);
            let busy = |other: &(Request, _)| other.0.block() == Some(block);
            let request = match self.random.below(20) {
                0 => Request::Flush,
                _ if self.in_flight.iter().flatten().any(busy) => continue,
                1..=9 => Request::Read { block },
                _ => Request::Write {
                    block,
                    generation: self.generations[block] + 1,
                },
            };
            self.offer(slot, request)?;
        }
        self.vring.kick_if_wanted(&self.memory, old);
        Ok(())
    }

    fn offer(&mut self, slot: u16, request: Request) -> Result<()> {
        let (at, first) = (memory_of(slot), 3 * slot);
        let (kind, flags) = match request {
            Request::Flush => (T_FLUSH, 0),
            Request::Read { .. } => (T_IN, WRITE),
            Request::Write { .. } => (T_OUT, 0),
        };
        let block = request.block().unwrap_or(0);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&((block * BLOCK_BYTES / 512) as u64).to_le_bytes());
        self.memory.put(at, &header);
        self.memory.put(at + 16, &[UNTOUCHED]);
        let data = match request {
            Request::Write { block, generation } => pattern(block, generation),
            _ => vec![UNTOUCHED; BLOCK_BYTES],
        };
        self.memory.put(at + 4096, &data);
        let len = u32::try_from(BLOCK_BYTES)?;
        let status = match request {
            Request::Flush => first + 1,
            _ => first + 2,
        };
        let table = self.vring.descriptors;
        let put = |index, descriptor| self.memory.descriptor(table, index, descriptor);
        put(first, (at, 16, NEXT, first + 1));
        put(first + 1, (at + 4096, len, flags | NEXT, first + 2));
        put(status, (at + 16, 1, WRITE, 0));
        self.in_flight[usize::from(slot)] = Some((request, Instant::now()));
        self.vring.offer(&self.memory, first);
        Ok(())
    }

    /// Waits for a notification or the end of the connection, not for long.
    fn wait(&self) -> Result<(bool, bool)> {
        let Some((_, stream)) = &self.connection else {
            return Ok((false, true));
        };
        // SAFETY: the descriptor is open as long as the vring.
        let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.vring.call.as_raw_fd()) };
        let mut fds = [
            PollFd::from_borrowed_fd(call, PollFlags::IN),
            PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::RDHUP),
        ];
        poll(
            &mut fds,
            Some(&Timespec::try_from(Duration::from_millis(20))?),
        )?;
        Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty()))
    }

    fn take_answers(&mut self) -> Result<()> {
        while let Some((head, _)) = self.vring.reap(&self.memory) {
            let slot = u16::try_from(head)? / 3;
            let entry = self.in_flight.get_mut(usize::from(slot));
            let Some((request, since)) = entry.and_then(Option::take) else {
                bail!("an answer to no request: {head}");
            };
            let at = memory_of(slot);
            let status = self.memory.byte(at + 16);
            ensure!(status == OK, "the status of a request is {status}");
            match request {
                Request::Flush => {}
                Request::Read { block } => ensure!(
                    self.memory.get(at + 4096, BLOCK_BYTES)
                        == pattern(block, self.generations[block]),
                    "block {block} is read, not as it was written last"
                ),
                Request::Write { block, generation } => self.generations[block] = generation,
            }
            self.done.requests += 1;
            self.done.longest_wait = self.done.longest_wait.max(since.elapsed());
        }
        Ok(())
    }
}

fn memory_of(slot: u16) -> u64 {
    DATA + 0x4000 * u64::from(slot)
}

/// What a block holds.
fn pattern(block: usize, generation: u32) -> Vec<u8> {
    match generation {
        0 => vec![0; BLOCK_BYTES],
        _ => Random((block as u64) << 32 | u64::from(generation)).bytes(BLOCK_BYTES),
    }
}
