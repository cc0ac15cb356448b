//! What happens when an end closes.

use std::io::{ErrorKind, Write};
use std::time::Duration;

use fd_ring::{Consumer, Producer, Transport};

use crate::common::transport;
use crate::pair::{Pair, rest, stream};

#[test]
fn a_producer_that_closes_is_the_end_after_its_last_byte() {
    let mut pair = Pair::upgraded();
    pair.write(stream(0, 50_000));
    drop(pair.writer);
    pair.producer.finish().expect("finished");
    assert!(rest(&mut pair.consumer) == stream(0, 50_000));
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
            while pair
                .producer
                .try_write(&[0; 4096])
                .expect("written")
                .is_some()
            {}
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
    for (taken, more, finishes) in [(12_345, 10_000, true), (7_000, 0, false)] {
        let mut pair = Pair::upgraded();
        pair.write(stream(0, 20_000));
        let mut got = pair.read(taken);
        drop(pair.consumer);
        let mut producer = pair.producer;
        producer.write_all(&stream(20_000, more)).expect("written");
        match finishes {
            true => producer.finish().expect("finished"),
            false => drop(producer),
        }
        drop(pair.writer);
        got.extend(rest(&mut pair.reader));
        assert!(got == stream(0, 20_000 + more), "{} bytes", got.len());
    }
}

#[test]
fn a_second_consumer_gets_a_ring_of_its_own_after_the_first() {
    let mut pair = Pair::upgraded();
    pair.write(stream(0, 9_000));
    let mut got = pair.read(5_000);
    let copy = pair.reader.try_clone().expect("copied");
    // The kernel's ring has one consumer at a time; a second shared one waits for its offer.
    let mut first = Some(pair.consumer);
    first.take_if(|_| transport() == Transport::Kernel);
    pair.consumer = Consumer::new(copy.into(), &pair.options).expect("a consumer");
    drop(first);
    pair.producer.flush().expect("flushed");
    pair.upgrade();
    pair.write(stream(9_000, 3_000));
    got.extend(pair.end_of_stream());
    assert!(got == stream(0, 12_000), "{} bytes", got.len());
}

#[test]
fn a_second_producer_gets_a_ring_of_its_own_after_the_first() {
    let mut pair = Pair::upgraded();
    pair.write(stream(0, 9_000));
    drop(pair.producer);
    let copy = pair.writer.try_clone().expect("copied");
    pair.producer = Producer::new(copy.into(), &pair.options).expect("a producer");
    let mut got = pair.read(9_000);
    pair.upgrade();
    pair.write(stream(9_000, 3_000));
    got.extend(pair.end_of_stream());
    assert!(got == stream(0, 12_000), "{} bytes", got.len());
}

#[test]
fn a_producer_finishes_without_an_error_exactly_if_its_bytes_were_all_taken() {
    for taken in [8_999, 9_000] {
        let mut pair = Pair::upgraded();
        pair.write(stream(0, 9_000));
        pair.read(taken);
        drop((pair.consumer, pair.reader));
        let finished = pair.producer.finish().map_err(|error| error.kind());
        let lost = Err(ErrorKind::BrokenPipe);
        assert_eq!(finished, if taken == 9_000 { Ok(()) } else { lost });
    }
}
