//! Peers that speak the protocol and then do what they like with the memory they share: by the way that
//! `common` says where both ways have it, by the shared one where it has more to say.

mod common;

use std::any::Any;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use common::{options, transport};
use fd_ring::{Consumer, Producer, RingError, Transport};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;
use upgrade_proto::{Listener, Name, connect};

const SIZE: usize = 128 << 10;
const PAGE: usize = 4096;
const ALL_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

const OFFER: u32 = 1;
const READY: u32 = 2;
const SWITCH: u32 = 3;

fn say(socket: &UnixStream, kind: u32, size: u64, file: Option<BorrowedFd<'_>>) {
    let mut message = Vec::from(*b"fd-ring\0");
    message.extend(1_u32.to_le_bytes());
    message.extend(kind.to_le_bytes());
    message.extend(size.to_le_bytes());
    message.extend([0; 8]);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
    if !files.is_empty() {
        assert!(rights.push(SendAncillaryMessage::ScmRights(&files)));
    }
    let _sent = sendmsg(
        socket,
        &[IoSlice::new(&message)],
        &mut rights,
        SendFlags::NOSIGNAL,
    );
}

/// Waits for a message of this kind; its descriptor.
fn hear(socket: &UnixStream, kind: u32) -> Option<OwnedFd> {
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("set");
    let mut message = [0; 32];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut message)],
        &mut rights,
        RecvFlags::empty(),
    );
    assert_eq!(received.expect("a message").bytes, 32);
    assert_eq!(message[12..16], kind.to_le_bytes());
    rights.drain().find_map(|one| match one {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    })
}

/// Words that a hostile peer may write, for as long as the test runs.
#[derive(Clone, Copy)]
struct Words(NonNull<AtomicU32>, usize);

// SAFETY: they are atomics, and the mapping is never undone.
unsafe impl Send for Words {}

impl Words {
    fn map(file: &OwnedFd, offset: usize, len_bytes: usize) -> Self {
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe {
            mmap(
                std::ptr::null_mut(),
                len_bytes,
                rights,
                MapFlags::SHARED,
                file,
                offset as u64,
            )
        };
        Self(
            NonNull::new(at.expect("mapped").cast()).expect("not null"),
            len_bytes / 4,
        )
    }

    fn all(&self) -> &[AtomicU32] {
        // SAFETY: mapped, aligned, for ever.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.1) }
    }
}

fn sealed(len_bytes: usize, seals: SealFlags) -> io::Result<(OwnedFd, Words)> {
    let file = memfd_create("hostile", MemfdFlags::ALLOW_SEALING)?;
    fallocate(&file, FallocateFlags::empty(), 0, len_bytes as u64)?;
    let words = Words::map(&file, 0, len_bytes);
    fcntl_add_seals(&file, seals)?;
    Ok((file, words))
}

const READ: u32 = 0;
const WRITE: u32 = 1;

/// The ring that the kernel gives to this side of a pipe.
fn kernel_ring(pipe: &impl AsFd, side: u32) -> OwnedFd {
    let mut args = [SIZE as u64, side.into(), 0, 0];
    // SAFETY: the kernel reads and writes `args`, within the size that is said.
    let answer = unsafe {
        libc::syscall(
            473,
            pipe.as_fd().as_raw_fd(),
            args.as_mut_ptr(),
            size_of_val(&args),
        )
    };
    assert!(answer >= 0, "{}", io::Error::last_os_error());
    assert_eq!(args[0], SIZE as u64);
    // SAFETY: made just now.
    unsafe { OwnedFd::from_raw_fd(answer.try_into().expect("a descriptor")) }
}

/// Numbers that do not repeat soon.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        let [a, b, c, d, ..] = self.0.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }
}

/// Writes nonsense, sometimes nearly right, into random words until told to stop.
fn scribble(words: Words, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let mut last = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        // Positions and flags more often than the rest.
        let index = match random.next() % 4 {
            0 => 0,
            // One of four says that it leaves.
            1 => 32 + usize::from(seed.is_multiple_of(4) && random.next().is_multiple_of(2)),
            _ => 34 + random.next() as usize % (words.all().len() - 34),
        };
        last = match random.next() % 4 {
            0 => random.next(),
            1 => last.wrapping_add(random.next() % 8192),
            2 => random.next() % 4,
            _ => 0,
        };
        words.all()[index].store(last, Ordering::Relaxed);
        for _ in 0..random.next() % 512 {
            std::hint::spin_loop();
        }
    }
}

fn is_dead(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    inner == Some(&RingError::Dead)
}

/// A consumer that was offered `file` as a ring of `size` bytes, and its producer's end of the socket.
fn offered(file: &OwnedFd, size: u64) -> (TempDir, Consumer, io::PipeWriter, UnixStream) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let name = Name::new("ring-buffer").expect("a name");
    let listener = Listener::bind(&writer, &name, &options.offer).expect("bound");
    let consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    let socket = listener
        .accept()
        .expect("accepted")
        .expect("a client")
        .into_stream();
    say(&socket, OFFER, size, Some(file.as_fd()));
    (dir, consumer, writer, socket)
}

/// Takes part in a ring for as long as it lives.
type Peer = Box<dyn Any>;

/// A consumer with a ring, the words that its hostile producer may write, and that one's hold on it.
fn with_hostile_producer(seed: u64) -> (Consumer, Vec<Words>, Peer) {
    if transport() == Transport::Kernel {
        let dir = tempfile::tempdir().expect("a directory");
        let (reader, writer) = io::pipe().expect("a pipe");
        let ring = kernel_ring(&writer, WRITE);
        let consumer = Consumer::new(reader.into(), &options(Transport::Kernel, &dir));
        let mut words = vec![Words::map(&ring, PAGE, PAGE)];
        if seed.is_multiple_of(2) {
            words.push(Words::map(&ring, 3 * PAGE, SIZE));
        }
        return (consumer.expect("a consumer"), words, Box::new(writer));
    }
    let (file, words) = sealed(3 * PAGE + SIZE, ALL_SEALS).expect("made");
    let (dir, mut consumer, writer, socket) = offered(&file, SIZE as u64);
    consumer.upgrade(Duration::ZERO).expect("asked");
    hear(&socket, READY).expect("its page");
    // The control page is not what the consumer goes by; LIVE, so that it looks at the rest.
    words.all()[8].store(1, Ordering::Relaxed);
    say(&socket, SWITCH, 0, None);
    consumer.upgrade(Duration::ZERO).expect("asked");
    // The producer's page and, for even seeds, control page and data as well.
    let words = match seed % 2 {
        0 => words,
        // SAFETY: the second page of the mapping.
        _ => Words(unsafe { words.0.add(PAGE / 4) }, PAGE / 4),
    };
    (consumer, vec![words], Box::new((dir, writer, socket)))
}

/// A producer with a ring, the words that its hostile consumer may write, and that one's hold on it.
fn with_hostile_consumer() -> (Producer, Words, Peer) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(transport(), &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    if transport() == Transport::Kernel {
        let ring = kernel_ring(&reader, READ);
        producer.upgrade(Duration::ZERO).expect("asked");
        let words = Words::map(&ring, 2 * PAGE, PAGE);
        return (producer, words, Box::new(reader));
    }
    let name = Name::new("ring-buffer").expect("a name");
    let asked = connect(&reader, &name, &options.lookup).expect("asked");
    let socket = asked.found().expect("offered").into_stream();
    producer.upgrade(Duration::ZERO).expect("asked");
    let theirs = hear(&socket, OFFER).expect("memory");
    // What is the producer's cannot be written by anybody else, ever.
    let rights = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping where the kernel likes, if it can be made.
    let writable = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGE,
            rights,
            MapFlags::SHARED,
            &theirs,
            0,
        )
    };
    assert_eq!(writable.err(), Some(rustix::io::Errno::PERM));
    assert!(rustix::io::write(&theirs, b"x").is_err() && ftruncate(&theirs, 0).is_err());
    let (page, words) = sealed(PAGE, ALL_SEALS).expect("made");
    say(&socket, READY, 0, Some(page.as_fd()));
    producer.upgrade(Duration::ZERO).expect("asked");
    (producer, words, Box::new((dir, reader, socket)))
}

/// Calls `work` for some time, or until it says that it is enough, while others scribble into `words`.
fn among_scribblers(words: Vec<Words>, seed: u64, mut work: impl FnMut() -> bool) {
    let stop = Arc::new(AtomicBool::new(false));
    let start = |words| {
        let told = Arc::clone(&stop);
        std::thread::spawn(move || scribble(words, seed, &told))
    };
    let hostile: Vec<_> = words.into_iter().map(start).collect();
    let limit = Instant::now() + Duration::from_millis(100);
    while Instant::now() < limit && !work() {}
    stop.store(true, Ordering::Relaxed);
    for one in hostile {
        one.join().expect("the hostile peer ends");
    }
}

#[test]
fn a_producer_that_scribbles_everywhere_kills_the_ring_and_nothing_else() {
    let mut deaths = 0;
    for seed in 1..25 {
        let (mut consumer, words, _peer) = with_hostile_producer(seed);
        assert_eq!(consumer.transport(), transport());
        let mut buffer = vec![0; 8192];
        among_scribblers(words, seed, || match consumer.try_peek(1) {
            Ok(Some(bytes)) if bytes.is_empty() => true,
            Ok(Some(bytes)) => {
                let count = bytes.copy_to(&mut buffer);
                assert!(bytes.len() <= SIZE);
                consumer.consume(count);
                false
            }
            Ok(None) => false,
            Err(error) => {
                assert!(is_dead(&error), "{error}");
                // For good.
                assert!(is_dead(&consumer.peek(1).expect_err("still dead")));
                deaths += 1;
                true
            }
        });
    }
    assert!(
        deaths > 5,
        "{deaths} deaths: does the consumer look at positions?"
    );
}

#[test]
fn a_consumer_that_scribbles_kills_the_ring_and_nothing_else() {
    let mut deaths = 0;
    for seed in 1..25 {
        let (mut producer, words, _peer) = with_hostile_consumer();
        assert_eq!(producer.transport(), transport());
        let mut answers = 0;
        among_scribblers(vec![words], seed, || match producer.try_write(&[7; 1000]) {
            Ok(_) => {
                answers += 1;
                false
            }
            Err(error) => {
                assert!(is_dead(&error), "{error}");
                assert!(is_dead(&producer.write(b"x").expect_err("still dead")));
                deaths += 1;
                true
            }
        });
        assert!(answers > 0 || deaths > 0);
    }
    assert!(
        deaths > 5,
        "{deaths} deaths: does the producer look at positions?"
    );
}

/// Asked so often without waiting, an end has found out that its peer was killed.
const OFTEN: usize = 10_000;

#[test]
fn who_never_polls_hears_that_its_producer_was_killed_after_what_that_one_wrote() {
    let (mut consumer, words, peer) = with_hostile_producer(1);
    // Its page is at the beginning of these: the position.
    words[0].all()[0].store(100, Ordering::Release);
    assert_eq!(
        consumer.try_peek(1).expect("asked").map(|b| b.len()),
        Some(100)
    );
    consumer.consume(100);
    for _ in 0..OFTEN {
        assert!(consumer.try_peek(1).expect("asked").is_none(), "it lives");
    }
    words[0].all()[0].store(107, Ordering::Release);
    // Descriptors go with a process that is killed; what it wrote last stays.
    drop(peer);
    let mut last = 0;
    let end = (0..OFTEN).find_map(|_| {
        let bytes = consumer.try_peek(1).expect("asked")?.len();
        consumer.consume(bytes);
        last += bytes;
        (bytes == 0).then_some(())
    });
    assert!(end.is_some(), "the end of the stream is never seen");
    assert_eq!(last, 7);
}

#[test]
fn who_never_polls_hears_that_its_consumer_was_killed() {
    let (mut producer, _words, peer) = with_hostile_consumer();
    let mut accepted = 0;
    while producer.try_write(&[7; 4096]).expect("written").is_some() {
        accepted += 1;
    }
    assert_eq!(accepted, SIZE / 4096);
    for _ in 0..OFTEN {
        assert!(producer.try_write(b"x").expect("asked").is_none());
    }
    drop(peer);
    let error = (0..OFTEN).find_map(|_| producer.try_write(b"x").err());
    let error = error.expect("that nobody reads is never seen");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

/// Sealed, and as long as it should be, but its pages are yet to be had.
fn sparse(len_bytes: usize) -> OwnedFd {
    let file = memfd_create("hostile", MemfdFlags::ALLOW_SEALING).expect("made");
    ftruncate(&file, len_bytes as u64).expect("as long");
    fcntl_add_seals(&file, ALL_SEALS).expect("sealed");
    file
}

#[test]
fn memory_that_could_be_pulled_away_is_refused_and_the_pipe_goes_on() {
    let total = 3 * PAGE + SIZE;
    let memory = |len, seals| sealed(len, seals).expect("made").0;
    let mut offers = vec![
        (
            "shrinkable",
            memory(total, ALL_SEALS.difference(SealFlags::SHRINK)),
            SIZE,
        ),
        (
            "growable",
            memory(total, ALL_SEALS.difference(SealFlags::GROW)),
            SIZE,
        ),
        (
            "writable",
            memory(total, ALL_SEALS.difference(SealFlags::FUTURE_WRITE)),
            SIZE,
        ),
        ("unsealed", memory(total, SealFlags::empty()), SIZE),
        ("not all there", sparse(total), SIZE),
        ("short", memory(total - PAGE, ALL_SEALS), SIZE),
        (
            "no power of two",
            memory(3 * PAGE + SIZE + PAGE, ALL_SEALS),
            SIZE + PAGE,
        ),
        ("too small", memory(3 * PAGE + PAGE, ALL_SEALS), PAGE),
        (
            "too large",
            memory(3 * PAGE + 2 * SIZE, ALL_SEALS),
            2 * SIZE,
        ),
        (
            "no memory",
            tempfile::tempfile().expect("a file").into(),
            SIZE,
        ),
    ];
    // Huge pages can run out under a mapping. Not every kernel has them.
    if let Ok(file) = memfd_create("huge", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB) {
        ftruncate(&file, 4 << 20).expect("as long");
        fcntl_add_seals(&file, ALL_SEALS).expect("sealed");
        offers.push(("huge pages", file, SIZE));
    }
    for (what, file, size) in offers {
        let (_dir, mut consumer, mut writer, _socket) = offered(&file, size as u64);
        writer.write_all(b"by the pipe").expect("written");
        let mut got = [0; 11];
        consumer.read_exact(&mut got).expect("read");
        assert_eq!(
            (&got, consumer.transport()),
            (b"by the pipe", Transport::Plain),
            "{what}"
        );
        say(&_socket, SWITCH, 0, None);
        drop(writer);
        drop(_socket);
        assert_eq!(consumer.read(&mut got).expect("read"), 0, "{what}");
    }
}

#[test]
fn a_peer_that_talks_nonsense_or_hangs_up_is_no_peer() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let name = Name::new("ring-buffer").expect("a name");
    for round in 0..20_u8 {
        let found = connect(&reader, &name, &options.lookup)
            .expect("asked")
            .found();
        let mut socket = found.expect("offered").into_stream();
        producer.upgrade(Duration::ZERO).expect("asked");
        match round % 4 {
            0 => drop(socket),
            1 => socket.write_all(&[round; 32]).expect("sent"),
            2 => say(&socket, READY, 0, None),
            _ => say(&socket, READY, 0, Some(reader.as_fd())),
        }
        producer.write_all(&[round; 100]).expect("written");
        let mut got = [0; 100];
        reader.read_exact(&mut got).expect("read");
        assert_eq!(got, [round; 100]);
        assert_eq!(producer.transport(), Transport::Plain);
    }
    drop(reader);
    let error = producer.write(b"x").expect_err("nobody reads");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

/// Whether it can be read at this moment.
fn is_ready(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).expect("polled") != 0
}

/// How often of ten times a producer with a full pipe is told to try again, and cannot write.
fn vain_calls(producer: &mut Producer) -> usize {
    let mut calls = 0;
    for _ in 0..10 {
        assert!(producer.try_write(b"x").expect("asked").is_none());
        assert!(producer.prepare_to_poll().expect("prepared"));
        calls += usize::from(is_ready(producer));
    }
    calls
}

#[test]
fn what_a_consumer_says_while_the_pipe_is_full_is_told_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let mut sent = 0;
    while let Some(count) = producer.try_write(&[9; 4096]).expect("written") {
        sent += count;
    }
    let name = Name::new("ring-buffer").expect("a name");
    let asked = connect(&reader, &name, &options.lookup).expect("asked");
    let socket = asked.found().expect("offered").into_stream();
    assert!(vain_calls(&mut producer) <= 1, "a consumer has come");
    hear(&socket, OFFER).expect("memory");
    let (page, _words) = sealed(PAGE, ALL_SEALS).expect("made");
    say(&socket, READY, 0, Some(page.as_fd()));
    assert!(vain_calls(&mut producer) <= 1, "it is ready for the ring");
    assert_eq!(producer.transport(), Transport::Plain);
    // What was accepted last is not in the pipe yet.
    let mut got = vec![0; sent - 4096];
    reader.read_exact(&mut got).expect("read");
    assert!(producer.try_write(b"x").expect("asked").is_some());
    hear(&socket, SWITCH);
    assert_eq!(producer.transport(), Transport::Shared);
}

#[test]
fn a_consumer_that_hangs_up_while_the_pipe_is_full_is_told_of_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    while producer.try_write(&[9; 4096]).expect("written").is_some() {}
    let name = Name::new("ring-buffer").expect("a name");
    for readies in [false, true] {
        let asked = connect(&reader, &name, &options.lookup).expect("asked");
        let socket = asked.found().expect("offered").into_stream();
        vain_calls(&mut producer);
        if readies {
            let (page, _words) = sealed(PAGE, ALL_SEALS).expect("made");
            say(&socket, READY, 0, Some(page.as_fd()));
            vain_calls(&mut producer);
        }
        drop(socket);
        assert!(vain_calls(&mut producer) <= 1, "readies: {readies}");
    }
}

#[test]
fn a_pipe_that_ended_before_its_producer_said_the_last_word_is_told_once() {
    let (file, _words) = sealed(3 * PAGE + SIZE, ALL_SEALS).expect("made");
    let (_dir, mut consumer, writer, socket) = offered(&file, SIZE as u64);
    drop(writer);
    let mut calls = 0;
    for _ in 0..10 {
        assert!(consumer.try_peek(1).expect("asked").is_none());
        assert!(consumer.prepare_to_poll().expect("prepared"));
        calls += usize::from(is_ready(&consumer));
    }
    assert!(calls <= 1, "{calls} of 10");
    drop(socket);
    assert!(is_ready(&consumer), "a lost wake-up");
    let bytes = consumer.try_peek(1).expect("asked").expect("the end");
    assert!(bytes.is_empty());
}
