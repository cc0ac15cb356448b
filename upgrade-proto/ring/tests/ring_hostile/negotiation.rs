//! Peers that misbehave before there is a ring.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use fd_ring::{Producer, Transport};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::peer::{
    ALL_SEALS, OFFER, PAGE, READY, SIZE, SWITCH, connected, offered, offering, receive, sealed,
    send,
};
use crate::tools::is_ready;

/// A sealed file of the right size without allocated pages.
fn sparse(len_bytes: usize) -> OwnedFd {
    let file = memfd_create("hostile", MemfdFlags::ALLOW_SEALING).expect("made");
    ftruncate(&file, len_bytes as u64).expect("as long");
    fcntl_add_seals(&file, ALL_SEALS).expect("sealed");
    file
}

#[test]
fn memory_that_could_be_truncated_is_refused_and_the_pipe_goes_on() {
    let total = 3 * PAGE + SIZE;
    let memory = |len, seals| sealed(len, seals).expect("made").0;
    let without = |seal| memory(total, ALL_SEALS.difference(seal));
    let (pipe, _writer) = std::io::pipe().expect("a pipe");
    let no_memory = tempfile::tempfile().expect("a file").into();
    let mut offers = vec![
        ("shrinkable", without(SealFlags::SHRINK), SIZE),
        ("growable", without(SealFlags::GROW), SIZE),
        ("writable", without(SealFlags::FUTURE_WRITE), SIZE),
        ("to be sealed further", without(SealFlags::SEAL), SIZE),
        ("unsealed", without(ALL_SEALS), SIZE),
        ("not all there", sparse(total), SIZE),
        ("short", memory(total - PAGE, ALL_SEALS), SIZE),
        (
            "no power of two",
            memory(total + PAGE, ALL_SEALS),
            SIZE + PAGE,
        ),
        ("too small", memory(3 * PAGE + PAGE, ALL_SEALS), PAGE),
        ("too large", memory(total + SIZE, ALL_SEALS), 2 * SIZE),
        ("no memory", no_memory, SIZE),
        ("no file", pipe.into(), SIZE),
    ];
    // Huge pages can run out under a mapping. Not every kernel has them.
    if let Ok(file) = memfd_create("huge", MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB) {
        ftruncate(&file, 4 << 20).expect("as long");
        fcntl_add_seals(&file, ALL_SEALS).expect("sealed");
        offers.push(("huge pages", file, SIZE));
    }
    for (what, file, size) in offers {
        let (_dir, mut consumer, mut writer, socket) = offered(&file, size as u64);
        writer.write_all(b"by the pipe").expect("written");
        let mut got = [0; 11];
        consumer.read_exact(&mut got).expect("read");
        assert_eq!(
            (&got, consumer.transport()),
            (b"by the pipe", Transport::Plain),
            "{what}"
        );
        send(&socket, SWITCH, 0, None);
        drop((writer, socket));
        assert_eq!(consumer.read(&mut got).expect("read"), 0, "{what}");
    }
}

#[test]
fn a_peer_that_sends_nonsense_or_disconnects_is_ignored() {
    let (_dir, options, mut producer, mut reader) = offering();
    for round in 0..20_u8 {
        let mut socket = connected(&reader, &options);
        producer.upgrade(Duration::ZERO).expect("asked");
        match round % 4 {
            0 => drop(socket),
            1 => socket.write_all(&[round; 32]).expect("sent"),
            2 => send(&socket, READY, 0, None),
            _ => send(&socket, READY, 0, Some(reader.as_fd())),
        }
        producer.write_all(&[round; 100]).expect("written");
        let mut got = [0; 100];
        reader.read_exact(&mut got).expect("read");
        assert_eq!(got, [round; 100]);
        assert_eq!(producer.transport(), Transport::Plain);
    }
    drop(reader);
    let error = producer.write(b"x").expect_err("no reader");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}

/// How many of ten polls of a producer with a full pipe return, although it cannot write.
fn vain_events(producer: &mut Producer) -> usize {
    let mut calls = 0;
    for _ in 0..10 {
        assert!(producer.try_write(b"x").expect("asked").is_none());
        assert!(producer.prepare_to_poll().expect("prepared"));
        calls += usize::from(is_ready(producer));
    }
    calls
}

#[test]
fn a_message_to_a_producer_with_a_full_pipe_is_one_event() {
    let (_dir, options, mut producer, mut reader) = offering();
    let mut sent = 0;
    while let Some(count) = producer.try_write(&[9; 4096]).expect("written") {
        sent += count;
    }
    let socket = connected(&reader, &options);
    assert!(vain_events(&mut producer) <= 1, "a consumer has come");
    receive(&socket, OFFER).expect("memory");
    let (page, _words) = sealed(PAGE, ALL_SEALS).expect("made");
    send(&socket, READY, 0, Some(page.as_fd()));
    assert!(vain_events(&mut producer) <= 1, "it is ready for the ring");
    assert_eq!(producer.transport(), Transport::Plain);
    // The last bytes are not in the pipe yet.
    let mut got = vec![0; sent - 4096];
    reader.read_exact(&mut got).expect("read");
    assert!(producer.try_write(b"x").expect("asked").is_some());
    receive(&socket, SWITCH);
    assert_eq!(producer.transport(), Transport::Shared);
}

#[test]
fn a_disconnect_from_a_producer_with_a_full_pipe_is_one_event() {
    let (_dir, options, mut producer, reader) = offering();
    while producer.try_write(&[9; 4096]).expect("written").is_some() {}
    for readies in [false, true] {
        let socket = connected(&reader, &options);
        vain_events(&mut producer);
        if readies {
            let (page, _words) = sealed(PAGE, ALL_SEALS).expect("made");
            send(&socket, READY, 0, Some(page.as_fd()));
            vain_events(&mut producer);
        }
        drop(socket);
        assert!(vain_events(&mut producer) <= 1, "readies: {readies}");
    }
}

#[test]
fn the_end_of_a_pipe_during_the_negotiation_is_one_event() {
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
