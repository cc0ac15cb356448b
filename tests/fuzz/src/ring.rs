//! The other end of a ring that two processes share: what it sends, and what it writes to the memory that it shares.
//!
//! What must hold: no access to other memory and no SIGBUS; no more bytes than there are in a ring; each call returns.

use std::cell::RefCell;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Once};
use std::time::Duration;

use fd_ring::{Consumer, Options, Producer, SERVICE, Transport};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::pipe::{PipeFlags, pipe_with};
use tempfile::TempDir;
use testkit::vhost::raw;
use upgrade_proto::{Listener, Name, connect};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::Script;

/// Bytes of data in a ring.
const SIZE: u32 = 128 << 10;
const PAGE: usize = 4096;
/// The memory of a producer: control page, index pages, data.
const TOTAL: usize = 3 * PAGE + SIZE as usize;

const ALL_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

/// Steps of one input, at most.
const MAX_STEPS: usize = 256;

thread_local! {
    static DIR: RefCell<Option<TempDir>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(input: &[u8]) {
    // A pipe without a reader is an error, as in every Rust program; libFuzzer's would end.
    static SIGPIPE: Once = Once::new();
    SIGPIPE.call_once(|| {
        signal_hook::flag::register(signal_hook::consts::SIGPIPE, Arc::default())
            .expect("a handler");
    });
    DIR.with_borrow_mut(|dir| {
        let dir = dir.get_or_insert_with(|| tempfile::tempdir().expect("a directory"));
        let mut options = Options {
            size_bytes: SIZE,
            spin: false,
            ..Options::default()
        };
        options.offer.kernel = false;
        options.offer.runtime_dir = Some(dir.path().to_owned());
        options.lookup.kernel = false;
        options.lookup.runtime_dirs = vec![dir.path().to_owned()];
        let mut script = Script::new(input);
        match script.bool() {
            true => hostile_consumer(&options, &mut script),
            false => hostile_producer(&options, &mut script),
        }
    });
}

/// Memory that the hostile end made, and can write to.
struct Shared {
    file: OwnedFd,
    words: MmapRegion,
}

impl Shared {
    /// Of the usual length with the usual seals, or not.
    fn new(script: &mut Script<'_>, usual_bytes: usize) -> Self {
        let odd = script.u8();
        let seals = match odd {
            // The last of them keeps nobody who has it mapped from writing to it.
            0..=15 => SealFlags::from_bits_truncate((odd & 7 | odd << 1 & 16).into()),
            _ => ALL_SEALS,
        };
        let len_bytes = match odd {
            16..=31 => PAGE * usize::from(odd - 15),
            _ => usual_bytes,
        };
        let file = memfd_create("hostile", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC);
        let file = file.expect("memory");
        match odd {
            32 => ftruncate(&file, len_bytes as u64),
            _ => fallocate(&file, FallocateFlags::empty(), 0, len_bytes as u64),
        }
        .expect("memory");
        let whole = FileOffset::new(File::from(file.try_clone().expect("cloned")), 0);
        let words = MmapRegion::from_file(whole, len_bytes).expect("mapped");
        fcntl_add_seals(&file, seals).expect("sealed");
        Self { file, words }
    }

    /// Writes to a word: of the control page, of an index page, or of the data.
    fn scribble(&self, script: &mut Script<'_>) {
        // Positions, sleepers, closed: of an end's page; state and closed ends of the control page.
        const WORDS: [usize; 8] = [0, 1, 32, 33, PAGE / 4, PAGE / 4 + 32, PAGE / 4 + 33, 8];
        let word = match script.u8() {
            n @ 0..=7 => WORDS[usize::from(n)],
            n => usize::from(n) << 4 | usize::from(script.u8() & 15),
        };
        let value = match script.u8() {
            0 => script.u32(),
            1 => SIZE,
            2 => SIZE + 1,
            3 => u32::MAX,
            n => 16 * u32::from(n - 4),
        };
        let memory = self.words.as_volatile_slice();
        if 4 * word + 4 <= memory.len() {
            memory
                .store(value, 4 * word, Ordering::Release)
                .expect("inside");
        }
    }
}

/// Sends a message: one of the protocol's, or another.
fn say(socket: &UnixStream, script: &mut Script<'_>, file: BorrowedFd<'_>) {
    let what = script.u8();
    let mut message = Vec::from(*b"fd-ring\0");
    message.extend(1_u32.to_le_bytes());
    message.extend(u32::from(what & 3).to_le_bytes());
    let size = match what >> 2 & 3 {
        0 if what & 3 == 1 => u64::from(SIZE),
        0 | 1 => 0,
        2 => u64::from(SIZE),
        _ => script.u64(),
    };
    message.extend(size.to_le_bytes());
    message.extend([0; 8]);
    if what & 0x20 != 0 {
        let at = usize::from(script.u8()) % message.len();
        message[at] ^= script.u8();
    }
    if what & 0x40 != 0 {
        message.truncate(usize::from(script.u8()));
    }
    let files = if what & 0x10 == 0 { vec![file] } else { vec![] };
    if !message.is_empty() {
        // It may have hung up.
        let _sent = raw::send(socket, &message, &files);
    }
}

fn pipe() -> (PipeReader, PipeWriter) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    (reader.into(), writer.into())
}

fn name() -> Name {
    Name::new(SERVICE).expect("a name")
}

fn hostile_producer(options: &Options, script: &mut Script<'_>) {
    let (reader, mut writer) = pipe();
    let listener = Listener::bind(&writer, &name(), &options.offer).expect("bound");
    let consumer = Consumer::new(reader.into(), options);
    let mut consumer = consumer.expect("a consumer");
    let client = listener.accept().expect("accepted").expect("a client");
    let mut socket = Some(client.into_stream());
    // Others that come are not served, and not refused either.
    let shared = Shared::new(script, TOTAL);
    let mut piped = 0;
    for _ in 0..MAX_STEPS {
        if script.is_over() {
            break;
        }
        let reads = &mut consumer;
        match script.u8() % 12 {
            0 => {
                // The whole negotiation, as it should be.
                if let Some(socket) = &socket {
                    offer(socket, shared.file.as_fd(), reads, &shared);
                }
            }
            1 => {
                if let Some(socket) = &socket {
                    say(socket, script, shared.file.as_fd());
                }
            }
            2..=4 => shared.scribble(script),
            5 if piped < 16 => {
                piped += 1;
                let bytes = vec![0x5a; 1 + usize::from(script.u8())];
                writer.write_all(&bytes).expect("room in the pipe");
            }
            6 => {
                let _polled = reads.prepare_to_poll();
            }
            7 => {
                let _transport = reads.upgrade(Duration::ZERO);
            }
            8 if script.u8() > 200 => socket = None,
            _ => peek(reads, script),
        }
    }
}

fn offer(socket: &UnixStream, file: BorrowedFd<'_>, consumer: &mut Consumer, shared: &Shared) {
    let usual = |kind: u8| [kind, 0];
    let memory = shared.words.as_volatile_slice();
    if memory.len() >= PAGE {
        // LIVE, which the consumer must not believe any other value for.
        memory
            .store(1_u32, 4 * 8, Ordering::Release)
            .expect("inside");
    }
    say(socket, &mut Script::new(&usual(1)), file);
    let _transport = consumer.upgrade(Duration::ZERO);
    say(socket, &mut Script::new(&usual(3 | 0x10)), file);
    let _transport = consumer.upgrade(Duration::ZERO);
}

fn peek(consumer: &mut Consumer, script: &mut Script<'_>) {
    let at_least = usize::from(script.u16());
    let mut target = [0; 256];
    if let Ok(Some(bytes)) = consumer.try_peek(at_least) {
        let len_bytes = bytes.len();
        assert!(len_bytes <= SIZE as usize, "{len_bytes} bytes");
        let copied = bytes.copy_to(&mut target);
        assert_eq!(copied, len_bytes.min(target.len()));
        consumer.consume(len_bytes.min(usize::from(script.u16())));
    }
}

fn hostile_consumer(options: &Options, script: &mut Script<'_>) {
    let (reader, writer) = pipe();
    let producer = Producer::new(writer.into(), options);
    let mut producer = producer.expect("a producer");
    let asked = connect(&reader, &name(), &options.lookup).expect("asked");
    let connection = asked.found().expect("an offer");
    let mut socket = Some(connection.into_stream());
    let shared = Shared::new(script, PAGE);
    let mut target = vec![0; 8192];
    for _ in 0..MAX_STEPS {
        if script.is_over() {
            break;
        }
        let writes = &mut producer;
        match script.u8() % 12 {
            0 => {
                if let Some(socket) = &socket {
                    let _transport = writes.upgrade(Duration::ZERO);
                    say(socket, &mut Script::new(&[2, 0]), shared.file.as_fd());
                    let _transport = writes.upgrade(Duration::ZERO);
                }
            }
            1 => {
                if let Some(socket) = &socket {
                    say(socket, script, shared.file.as_fd());
                }
            }
            2..=4 => shared.scribble(script),
            5 if writes.transport() == Transport::Plain => {
                // What the producer wrote to the pipe, if there is anything.
                if rustix::io::ioctl_fionread(&reader).is_ok_and(|count| count > 0) {
                    let _read = rustix::io::read(&reader, &mut target);
                }
            }
            6 => {
                let _polled = writes.prepare_to_poll();
            }
            7 => {
                let _transport = writes.upgrade(Duration::ZERO);
            }
            8 if script.u8() > 200 => socket = None,
            10 => {
                let len_bytes = usize::from(script.u16());
                if let Ok(Some(mut space)) = writes.try_reserve(len_bytes) {
                    assert!(space.len() >= len_bytes && space.len() <= SIZE as usize);
                    space.put(0, &target[..len_bytes.min(target.len())]);
                    let _committed = space.commit(len_bytes);
                }
            }
            _ => {
                let len_bytes = usize::from(script.u16()) % target.len();
                let _written = writes.try_write(&target[..len_bytes]);
            }
        }
    }
    // It would wait for room in the pipe.
    drop(reader);
    drop(producer);
}
