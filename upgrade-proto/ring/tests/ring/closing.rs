//! What happens when an end closes.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use fd_ring::{Consumer, Producer, Transport};

use crate::common::transport;
use crate::pair::{Pair, stream};

#[test]
fn a_producer_that_closes_is_the_end_after_its_last_byte() {
    let mut pair = Pair::upgraded();
    pair.producer
        .write_all(&stream(0, 50_000))
        .expect("written");
    drop(pair.writer);
    pair.producer.finish().expect("finished");
    let mut got = Vec::new();
    pair.consumer.read_to_end(&mut got).expect("read");
    assert!(got == stream(0, 50_000));
    assert!(pair.consumer.peek(1).expect("asked").is_empty());
}

#[test]
fn a_sleeping_consumer_is_woken_when_the_producer_closes() {
    let pair = Pair::upgraded();
    drop(pair.writer);
    let mut consumer = pair.consumer;
    let reading = std::thread::spawn(move || consumer.peek(1).map(|bytes| bytes.len()));
    // Long enough for it to sleep in the futex and then in poll.
    std::thread::sleep(Duration::from_millis(60));
    drop(pair.producer);
    assert_eq!(reading.join().expect("the reader").expect("read"), 0);
}

#[test]
fn a_consumer_that_closes_breaks_the_pipe_of_a_producer_that_writes_or_sleeps() {
    for sleeps in [false, true] {
        let mut pair = Pair::upgraded();
        drop(pair.reader);
        if sleeps {
            while pair.producer.try_reserve(4096).expect("asked").is_some() {
                pair.producer
                    .reserve(4096)
                    .expect("room")
                    .commit(4096)
                    .expect("committed");
            }
        }
        let mut producer = pair.producer;
        let writing = std::thread::spawn(move || {
            loop {
                if let Err(error) = producer.write_all(&[0; 512]) {
                    return error.kind();
                }
            }
        });
        std::thread::sleep(Duration::from_millis(if sleeps { 60 } else { 1 }));
        drop(pair.consumer);
        assert_eq!(writing.join().expect("the writer"), ErrorKind::BrokenPipe);
    }
}

#[test]
fn bytes_that_a_closed_consumer_has_not_taken_go_to_the_next_reader() {
    let mut pair = Pair::upgraded();
    pair.producer
        .write_all(&stream(0, 30_000))
        .expect("written");
    let mut first = vec![0; 12_345];
    pair.consumer.read_exact(&mut first).expect("read");
    drop(pair.consumer);
    pair.producer
        .write_all(&stream(30_000, 10_000))
        .expect("written");
    pair.producer.finish().expect("finished");
    drop(pair.writer);
    let mut rest = Vec::new();
    pair.reader.read_to_end(&mut rest).expect("read");
    first.extend(rest);
    assert!(first == stream(0, 40_000), "{} bytes", first.len());
}

#[test]
fn a_second_consumer_gets_a_ring_of_its_own_after_the_first() {
    let mut pair = Pair::upgraded();
    pair.producer.write_all(&stream(0, 9_000)).expect("written");
    let mut got = vec![0; 5_000];
    pair.consumer.read_exact(&mut got).expect("read");
    let copy = pair.reader.try_clone().expect("copied");
    // The kernel's ring has one consumer at a time; a second shared one waits for its offer.
    let mut first = Some(pair.consumer);
    first.take_if(|_| transport() == Transport::Kernel);
    pair.consumer = Consumer::new(copy.into(), &pair.options).expect("a consumer");
    drop(first);
    pair.producer.flush().expect("flushed");
    pair.upgrade();
    pair.producer
        .write_all(&stream(9_000, 3_000))
        .expect("written");
    drop((pair.producer, pair.writer));
    pair.consumer.read_to_end(&mut got).expect("read");
    assert!(got == stream(0, 12_000), "{} bytes", got.len());
}

#[test]
fn a_second_producer_gets_a_ring_of_its_own_after_the_first() {
    let mut pair = Pair::upgraded();
    pair.producer.write_all(&stream(0, 9_000)).expect("written");
    drop(pair.producer);
    let copy = pair.writer.try_clone().expect("copied");
    pair.producer = Producer::new(copy.into(), &pair.options).expect("a producer");
    let mut got = vec![0; 9_000];
    pair.consumer.read_exact(&mut got).expect("read");
    pair.upgrade();
    pair.producer
        .write_all(&stream(9_000, 3_000))
        .expect("written");
    drop((pair.producer, pair.writer));
    pair.consumer.read_to_end(&mut got).expect("read");
    assert!(got == stream(0, 12_000), "{} bytes", got.len());
}

#[test]
fn a_producer_finishes_without_an_error_exactly_if_its_bytes_were_all_taken() {
    for left in [false, true] {
        let mut pair = Pair::upgraded();
        drop(pair.reader);
        pair.producer.write_all(&stream(0, 9_000)).expect("written");
        let mut got = vec![0; if left { 8_999 } else { 9_000 }];
        pair.consumer.read_exact(&mut got).expect("read");
        drop(pair.consumer);
        let finished = pair.producer.finish();
        match left {
            false => finished.expect("nothing is lost"),
            true => {
                let error = finished.expect_err("a byte is lost");
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
            }
        }
    }
}

#[test]
fn a_dropped_producer_gives_what_its_consumer_left_to_the_next_reader() {
    let mut pair = Pair::upgraded();
    pair.producer
        .write_all(&stream(0, 20_000))
        .expect("written");
    let mut got = vec![0; 7_000];
    pair.consumer.read_exact(&mut got).expect("read");
    drop(pair.consumer);
    drop((pair.producer, pair.writer));
    pair.reader.read_to_end(&mut got).expect("read");
    assert!(got == stream(0, 20_000), "{} bytes", got.len());
}
