//! How the bytes go over from the pipe to a ring, and beside other programs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fd_ring::{Consumer, Producer, Transport};

use crate::common::{options, transport};
use crate::pair::{Pair, rest, stream};
use crate::tools::is_ready;

#[test]
fn the_two_ends_meet_whichever_is_first_and_say_so() {
    let mut pair = Pair::new();
    assert_eq!(pair.producer.transport(), Transport::Plain);
    pair.upgrade();
    pair.write("through the ring");
    assert_eq!(pair.peek(1), b"through the ring");
    assert_eq!(pair.producer.counters().ring_bytes, 16);
    let mut pair = Pair::made_in_order(transport(), true);
    for round in 0..40 {
        let record = stream(round * 64, 64);
        pair.write(&record);
        assert_eq!(pair.read(64), record, "round {round}");
    }
    assert_eq!(pair.transports(), (transport(), transport()));
}

#[test]
fn what_was_in_the_pipe_before_the_ring_comes_before_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(transport(), &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let mut sent = 0;
    // As much as fits into the pipe without waiting.
    while let Some(count) = producer.try_write(&stream(sent, 4000)).expect("written") {
        sent += count;
        if sent > 60_000 {
            break;
        }
    }
    let mut consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    let writing = std::thread::spawn(move || {
        let mut sent = sent;
        while sent < 1_000_000 {
            producer.write_all(&stream(sent, 777)).expect("written");
            sent += 777;
        }
        (sent, producer.counters(), producer)
    });
    let mut got = Vec::new();
    let mut part = [0; 1000];
    while got.len() < 1_000_000 {
        let count = consumer.read(&mut part).expect("read");
        assert!(count > 0, "an end after {} bytes", got.len());
        got.extend_from_slice(&part[..count]);
    }
    let (sent, counters, producer) = writing.join().expect("the writer");
    drop(producer);
    consumer.read_to_end(&mut got).expect("the rest");
    assert!(got == stream(0, sent), "the bytes differ");
    assert!(
        counters.ring_bytes > 0 && counters.ring_bytes < sent as u64,
        "{counters:?}"
    );
}

#[test]
fn a_record_that_begins_in_the_pipe_and_ends_in_the_ring_is_one_record() {
    let mut pair = Pair::new();
    pair.write("first ha");
    pair.upgrade();
    pair.write("lf, then the rest");
    assert_eq!(pair.peek(16)[..16], *b"first half, then");
    pair.consumer.consume(11);
    assert_eq!(pair.peek(14), b" then the rest");
    pair.consumer.consume(14);
    assert!(pair.consumer.try_peek(1).expect("asked").is_none());
}

#[test]
fn a_second_producer_beside_the_first_writes_to_the_pipe_and_is_read() {
    let mut pair = Pair::upgraded_by(Transport::Shared);
    let copy = pair.writer.try_clone().expect("copied");
    let mut other = Producer::new(copy.into(), &pair.options).expect("a producer");
    pair.write("ring ");
    other.write_all(b"pipe ").expect("written");
    assert_eq!(other.transport(), Transport::Plain);
    assert_eq!(pair.read(5), b"ring ");
    assert_eq!(pair.read(5), b"pipe ");
    pair.write("again");
    assert_eq!(pair.read(5), b"again");
}

#[test]
fn a_record_that_begins_in_the_ring_and_ends_in_the_pipe_is_one_record() {
    for polls in [true, false] {
        let mut pair = Pair::upgraded_by(Transport::Shared);
        pair.write("half a ");
        assert!(pair.consumer.try_peek(13).expect("asked").is_none());
        pair.writer.write_all(b"record").expect("written");
        if polls {
            assert!(pair.consumer.prepare_to_poll().expect("prepared"));
            assert!(is_ready(&pair.consumer), "the pipe is readable");
            let bytes = pair.consumer.try_peek(13).expect("asked");
            assert_eq!(bytes.expect("there").to_vec(), b"half a record");
        }
        assert_eq!(pair.peek(13), b"half a record");
        pair.consumer.consume(13);
        pair.write("!");
        assert_eq!(pair.peek(1), b"!");
    }
}

#[test]
fn an_upgrade_can_be_waited_for_without_a_limit() {
    let mut pair = Pair::new();
    let mut producer = pair.producer;
    let asking = std::thread::spawn(move || {
        let transport = producer.upgrade(Duration::MAX).expect("asked");
        (producer, transport)
    });
    let consumers = pair.consumer.upgrade(Duration::MAX).expect("asked");
    let (_producer, producers) = asking.join().expect("the producer");
    assert_eq!([consumers, producers], [pair.transport; 2]);
}

#[test]
fn other_files_than_pipes_are_read_and_written_plainly() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("file");
    let made = File::create_new(&path).expect("made");
    let opened = File::open(&path).expect("opened");
    let (near, far) = UnixStream::pair().expect("a pair");
    let files: [(OwnedFd, OwnedFd, usize); 2] = [
        (made.into(), opened.into(), 100_000),
        (near.into(), far.into(), 11),
    ];
    for (out, source, len_bytes) in files {
        let options = options(transport(), &dir);
        let mut producer = Producer::new(out, &options).expect("a producer");
        producer.write_all(&stream(0, len_bytes)).expect("written");
        producer.finish().expect("finished");
        let mut consumer = Consumer::new(source, &options).expect("a consumer");
        assert!(rest(&mut consumer) == stream(0, len_bytes));
    }
}
