//! How the bytes go over from the pipe to a ring, and beside other programs.

use std::io::{self, Read, Write};
use std::time::Duration;

use fd_ring::{Consumer, Producer, Transport};

use crate::common::{options, transport};
use crate::pair::{Pair, stream};
use crate::tools::is_ready;

#[test]
fn the_two_ends_meet_whichever_is_first_and_say_so() {
    let mut pair = Pair::new();
    assert_eq!(pair.producer.transport(), Transport::Plain);
    pair.upgrade();
    pair.producer
        .write_all(b"through the ring")
        .expect("written");
    assert_eq!(
        pair.consumer.peek(1).expect("there").to_vec(),
        b"through the ring"
    );
    assert_eq!(pair.producer.counters().ring_bytes, 16);
    // The consumer first.
    let dir = tempfile::tempdir().expect("a directory");
    let options = options(transport(), &dir);
    let (reader, writer) = io::pipe().expect("a pipe");
    let mut consumer = Consumer::new(reader.into(), &options).expect("a consumer");
    let mut producer = Producer::new(writer.into(), &options).expect("a producer");
    let place = &mut [0; 4096];
    for round in 0..40_usize {
        let record = stream(round * 64, 64);
        producer.write_all(&record).expect("written");
        consumer.read_exact(&mut place[..64]).expect("read");
        assert_eq!(place[..64], record, "round {round}");
    }
    assert_eq!(
        (producer.transport(), consumer.transport()),
        (transport(), transport())
    );
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
    pair.producer.write_all(b"first ha").expect("written");
    pair.upgrade();
    pair.producer
        .write_all(b"lf, then the rest")
        .expect("written");
    assert_eq!(
        pair.consumer.peek(16).expect("there").first(16).to_vec(),
        b"first half, then"
    );
    pair.consumer.consume(11);
    assert_eq!(
        pair.consumer.peek(14).expect("there").to_vec(),
        b" then the rest"
    );
    pair.consumer.consume(14);
    assert!(pair.consumer.try_peek(1).expect("asked").is_none());
}

#[test]
fn a_plain_reader_gets_the_bytes_and_the_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let (mut reader, writer) = io::pipe().expect("a pipe");
    let mut producer =
        Producer::new(writer.into(), &options(transport(), &dir)).expect("a producer");
    let writing = std::thread::spawn(move || {
        for round in 0..1000 {
            let mut record = producer.reserve(300).expect("room");
            record.copy_from_slice(&stream(round * 300, 300));
            record.commit(300).expect("committed");
        }
        assert_eq!(producer.transport(), Transport::Plain);
        producer.finish().expect("finished");
    });
    let mut got = Vec::new();
    reader.read_to_end(&mut got).expect("read");
    writing.join().expect("the writer");
    assert!(got == stream(0, 300_000));
}

#[test]
fn a_plain_writer_is_read_to_its_end() {
    let dir = tempfile::tempdir().expect("a directory");
    let (reader, mut writer) = io::pipe().expect("a pipe");
    let mut consumer =
        Consumer::new(reader.into(), &options(transport(), &dir)).expect("a consumer");
    let writing = std::thread::spawn(move || writer.write_all(&stream(0, 300_000)));
    let mut got = Vec::new();
    loop {
        let bytes = consumer.peek(7).expect("read");
        let count = bytes.len();
        got.extend(bytes.to_vec());
        consumer.consume(count);
        if count == 0 {
            break;
        }
    }
    writing.join().expect("the writer").expect("written");
    assert!(got == stream(0, 300_000));
    assert_eq!(consumer.transport(), Transport::Plain);
}

#[test]
fn a_second_producer_beside_the_first_writes_to_the_pipe_and_is_read() {
    let mut pair = Pair::by(Transport::Shared);
    pair.upgrade();
    let copy = pair.writer.try_clone().expect("copied");
    let mut other = Producer::new(copy.into(), &pair.options).expect("a producer");
    pair.producer.write_all(b"ring ").expect("written");
    other.write_all(b"pipe ").expect("written");
    assert_eq!(other.transport(), Transport::Plain);
    let mut got = [0; 5];
    pair.consumer.read_exact(&mut got).expect("read");
    assert_eq!(&got, b"ring ");
    pair.consumer.read_exact(&mut got).expect("read");
    assert_eq!(&got, b"pipe ");
    pair.producer.write_all(b"again").expect("written");
    pair.consumer.read_exact(&mut got).expect("read");
    assert_eq!(&got, b"again");
}

#[test]
fn a_record_that_begins_in_the_ring_and_ends_in_the_pipe_is_one_record() {
    for polls in [true, false] {
        let mut pair = Pair::by(Transport::Shared);
        pair.upgrade();
        pair.producer.write_all(b"half a ").expect("written");
        assert!(pair.consumer.try_peek(13).expect("asked").is_none());
        pair.writer.write_all(b"record").expect("written");
        if polls {
            assert!(pair.consumer.prepare_to_poll().expect("prepared"));
            assert!(is_ready(&pair.consumer), "the pipe is readable");
            let bytes = pair.consumer.try_peek(13).expect("asked");
            assert_eq!(bytes.expect("there").to_vec(), b"half a record");
        }
        let bytes = pair.consumer.peek(13).expect("read").to_vec();
        assert_eq!(bytes, b"half a record");
        pair.consumer.consume(13);
        pair.producer.write_all(b"!").expect("written");
        assert_eq!(pair.consumer.peek(1).expect("read").to_vec(), b"!");
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
    assert_eq!(
        pair.consumer.upgrade(Duration::MAX).expect("asked"),
        pair.transport
    );
    let (_producer, transport) = asking.join().expect("the producer");
    assert_eq!(transport, pair.transport);
}

#[test]
fn other_files_than_pipes_are_read_and_written_plainly() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("file");
    let file = std::fs::File::create(&path).expect("made");
    let mut producer = Producer::new(file.into(), &options(transport(), &dir)).expect("a producer");
    producer.write_all(&stream(0, 100_000)).expect("written");
    producer.finish().expect("finished");
    let file = std::fs::File::open(&path).expect("opened");
    let mut consumer = Consumer::new(file.into(), &options(transport(), &dir)).expect("a consumer");
    let mut got = Vec::new();
    consumer.read_to_end(&mut got).expect("read");
    assert!(got == stream(0, 100_000));
    let (near, far) = std::os::unix::net::UnixStream::pair().expect("a pair");
    let mut producer = Producer::new(near.into(), &options(transport(), &dir)).expect("a producer");
    let mut consumer = Consumer::new(far.into(), &options(transport(), &dir)).expect("a consumer");
    producer.write_all(b"by a socket").expect("written");
    producer.finish().expect("finished");
    got.clear();
    consumer.read_to_end(&mut got).expect("read");
    assert_eq!(got, b"by a socket");
}
