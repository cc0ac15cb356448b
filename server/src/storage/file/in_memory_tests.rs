//! A file in memory is read and written without the ring.

use std::path::Path;

use super::bench::{FORCED, Memory, WRITE, opened};
use super::*;
use crate::storage::CacheMode;

/// A queue over a file in memory, and the file.
fn in_memory(len_bytes: u64) -> (FileQueue, std::fs::File, Ring) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = std::fs::File::from(rustix::fs::memfd_create("disk", flags).unwrap());
    file.set_len(len_bytes).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let shared = opened(Path::new(&path), CacheMode::Auto);
    assert!(shared.is_in_memory);
    let mut ring = Ring::new(8).unwrap();
    let queue = FileQueue::new(Arc::new(shared), &mut ring, 8).unwrap();
    (queue, file, ring)
}

#[test]
fn a_file_in_memory_is_read_and_written_at_once() {
    let (mut queue, file, mut ring) = in_memory(1 << 20);
    let mut run = |memory: &mut Memory, op| {
        let mut request = memory.request(op);
        let progress = queue.start(&mut ring, 0, &mut request);
        request.finish();
        assert_eq!(ring.in_flight(), 0);
        progress
    };
    let mut written = Memory::new(3 * 512);
    for (n, byte) in written.bytes.iter_mut().enumerate() {
        *byte = u8::try_from(n % 251).unwrap();
    }
    assert_eq!(run(&mut written, WRITE), Progress::Done(Ok(())));
    let mut back = Memory::new(3 * 512);
    assert_eq!(run(&mut back, Op::Read), Progress::Done(Ok(())));
    assert_eq!(back.bytes, written.bytes);
    // Truncated by another program: zeroes from there on.
    file.set_len(4096 + 700).unwrap();
    back.bytes.fill(0xaa);
    assert_eq!(run(&mut back, Op::Read), Progress::Done(Ok(())));
    assert_eq!(back.bytes[..700], written.bytes[..700]);
    assert!(back.bytes[700..].iter().all(|&byte| byte == 0));
}

#[test]
fn an_error_of_a_file_in_memory_is_told() {
    let (mut queue, file, mut ring) = in_memory(1 << 20);
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::FUTURE_WRITE).unwrap();
    let mut memory = Memory::new(512);
    let mut request = memory.request(WRITE);
    let progress = queue.start(&mut ring, 0, &mut request);
    request.finish();
    assert_eq!(progress, Progress::Done(Err(IoError::Io)));
}

#[test]
fn a_forced_write_to_a_file_in_memory_goes_the_long_way() {
    let (mut queue, _file, mut ring) = in_memory(1 << 20);
    let mut memory = Memory::new(512);
    let mut request = memory.request(FORCED);
    assert_eq!(queue.start(&mut ring, 0, &mut request), Progress::Pending);
    assert!(ring.drain(std::time::Duration::from_secs(60), None));
    request.finish();
}
