//! Peers that speak the protocol and map what they are given.

use std::any::Any;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use fd_ring::{Consumer, Options, Producer, SERVICE, Transport};
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, ftruncate, memfd_create,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use tempfile::TempDir;
use upgrade_proto::{Listener, Name, connect};

use crate::common::{options, transport};

pub const SIZE: usize = 128 << 10;

pub const PAGE: usize = 4096;

pub const ALL_SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

pub const OFFER: u32 = 1;

pub const READY: u32 = 2;

pub const SWITCH: u32 = 3;

pub fn send(socket: &UnixStream, kind: u32, size: u64, file: Option<BorrowedFd<'_>>) {
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

/// Waits for a message of this kind; returns its descriptor.
pub fn receive(socket: &UnixStream, kind: u32) -> Option<OwnedFd> {
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

/// Words that a hostile peer can write, mapped until the process ends.
#[derive(Clone, Copy)]
pub struct Words(NonNull<AtomicU32>, usize);

// SAFETY: they are atomics, and the mapping is never removed.
unsafe impl Send for Words {}

impl Words {
    pub fn map(file: &OwnedFd, offset: usize, len_bytes: usize) -> Self {
        Self::try_map(file, offset, len_bytes).expect("mapped")
    }

    fn try_map(file: &OwnedFd, offset: usize, len_bytes: usize) -> Result<Self, Errno> {
        let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice, if it is made.
        let at = unsafe { mmap(null_mut(), len_bytes, rights, flags, file, offset as u64) }?;
        Ok(Self(
            NonNull::new(at.cast()).expect("not null"),
            len_bytes / 4,
        ))
    }

    pub fn all(&self) -> &[AtomicU32] {
        // SAFETY: mapped and aligned, until the process ends.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.1) }
    }
}

pub fn sealed(len_bytes: usize, seals: SealFlags) -> io::Result<(OwnedFd, Words)> {
    let file = memfd_create("hostile", MemfdFlags::ALLOW_SEALING)?;
    fallocate(&file, FallocateFlags::empty(), 0, len_bytes as u64)?;
    let words = Words::map(&file, 0, len_bytes);
    fcntl_add_seals(&file, seals)?;
    Ok((file, words))
}

pub const READ: u32 = 0;

pub const WRITE: u32 = 1;

/// The kernel's ring of this side of a pipe.
pub fn kernel_ring(pipe: &impl AsFd, side: u32) -> OwnedFd {
    let mut args = [SIZE as u64, side.into(), 0, 0];
    // SAFETY: the kernel reads and writes `args`, within the size that is passed.
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

/// A producer that would share a ring, its options and the other end of its pipe.
pub fn offering() -> (TempDir, Options, Producer, io::PipeReader) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let producer = Producer::new(writer.into(), &options).expect("a producer");
    (dir, options, producer, reader)
}

/// A consumer's end of a socket to such a producer.
pub fn connected(reader: &io::PipeReader, options: &Options) -> UnixStream {
    let name = Name::new(SERVICE).expect("a name");
    let asked = connect(reader, &name, &options.lookup).expect("asked");
    asked.found().expect("offered").into_stream()
}

/// A consumer to which `file` was offered as a ring of `size` bytes, and the producer's end of the socket.
pub fn offered(file: &OwnedFd, size: u64) -> (TempDir, Consumer, io::PipeWriter, UnixStream) {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(Transport::Shared, &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let name = Name::new(SERVICE).expect("a name");
    let listener = Listener::bind(&writer, &name, &options.offer).expect("bound");
    let consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    let socket = listener
        .accept()
        .expect("accepted")
        .expect("a client")
        .into_stream();
    send(&socket, OFFER, size, Some(file.as_fd()));
    (dir, consumer, writer, socket)
}

/// What keeps the hostile end of a ring open.
pub type Peer = Box<dyn Any>;

/// A consumer with a ring, and the words that its hostile producer can write.
pub fn with_hostile_producer(seed: u64) -> (Consumer, Vec<Words>, Peer) {
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
    receive(&socket, READY).expect("its page");
    // The consumer uses nothing of the control page but the state: LIVE, so that it reads the rest.
    words.all()[8].store(1, Ordering::Relaxed);
    send(&socket, SWITCH, 0, None);
    consumer.upgrade(Duration::ZERO).expect("asked");
    // The producer's page and, for even seeds, control page and data as well.
    let words = match seed % 2 {
        0 => words,
        // SAFETY: the second page of the mapping.
        _ => Words(unsafe { words.0.add(PAGE / 4) }, PAGE / 4),
    };
    (consumer, vec![words], Box::new((dir, writer, socket)))
}

/// A producer with a ring, and the words that its hostile consumer can write.
pub fn with_hostile_consumer() -> (Producer, Words, Peer) {
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
    let socket = connected(&reader, &options);
    producer.upgrade(Duration::ZERO).expect("asked");
    let theirs = receive(&socket, OFFER).expect("memory");
    // No other process can write to the producer's file.
    let mapped = Words::try_map(&theirs, 0, PAGE);
    assert_eq!(mapped.err(), Some(Errno::PERM));
    assert!(rustix::io::write(&theirs, b"x").is_err() && ftruncate(&theirs, 0).is_err());
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&theirs, punch, 0, 4096), Err(Errno::PERM));
    let (page, words) = sealed(PAGE, ALL_SEALS).expect("made");
    send(&socket, READY, 0, Some(page.as_fd()));
    producer.upgrade(Duration::ZERO).expect("asked");
    (producer, words, Box::new((dir, reader, socket)))
}
