//! The calls of both ends: sizes, polling, and all mixes.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use fd_ring::{Consumer, End, MAX_RECORD_BYTES, Options, RingError, connect};

use crate::pair::{Pair, below, stream};
use crate::tools::{Random, is_ready, is_ready_within};

/// The longest that a wake-up may take.
const TIMEOUT: Duration = Duration::from_secs(20);

#[test]
fn a_poller_for_a_whole_record_is_woken_for_its_first_half_at_most_once() {
    let mut pair = Pair::upgraded();
    pair.write("half a ");
    let mut ready = 0;
    for _ in 0..10 {
        assert!(pair.consumer.try_peek(13).expect("asked").is_none());
        if pair.consumer.prepare_to_poll().expect("prepared") {
            ready += usize::from(is_ready(&pair.consumer));
        }
    }
    assert!(ready <= 1, "{ready} times of 10");
    pair.write("record");
    assert!(is_ready(&pair.consumer), "a lost wake-up");
    let bytes = pair.consumer.try_peek(13).expect("asked");
    assert_eq!(bytes.expect("there").to_vec(), b"half a record");
}

#[test]
fn a_file_is_read_into_the_reservation_and_no_further() {
    for mut pair in Pair::both() {
        let (file, mut source) = io::pipe().expect("a pipe");
        source.write_all(&stream(3, 40)).expect("written");
        let mut room = pair.producer.reserve(20).expect("room");
        room.put(0, &stream(0, 3));
        assert_eq!(room.read_from(3, &file).expect("read"), 17);
        assert_eq!(room.read_from(20, &file).expect("read"), 0, "no room");
        assert_eq!(room.read_from(99, &file).expect("read"), 0, "no room");
        room.commit(20).expect("committed");
        assert!(pair.peek(20) == stream(0, 20));
    }
}

#[test]
fn more_than_was_reserved_cannot_be_written() {
    for (offset, len_bytes) in [(0, 17), (16, 1), (usize::MAX, 2)] {
        for mut pair in Pair::both() {
            let writing = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut room = pair.producer.reserve(16).expect("room");
                room.put(offset, &vec![0; len_bytes]);
            }));
            assert!(writing.is_err(), "{len_bytes} bytes at {offset}");
        }
    }
}

#[test]
fn try_and_poll_serve_a_loop_that_never_blocks() {
    let pair = Pair::upgraded();
    let (mut producer, mut consumer) = (pair.producer, pair.consumer);
    drop((pair.reader, pair.writer));
    let total = 3_000_000;
    let writing = std::thread::spawn(move || {
        let mut random = Random(77);
        let mut sent = 0;
        while sent < total {
            let len_bytes = (1 + below(&mut random, 5000)).min(total - sent);
            let bytes = stream(sent, len_bytes);
            match producer.try_write(&bytes).expect("written") {
                Some(count) => sent += count,
                None if producer.prepare_to_poll().expect("prepared") => {
                    assert!(is_ready_within(&producer, TIMEOUT), "a lost wake-up");
                }
                None => {}
            }
        }
    });
    let mut random = Random(99);
    let mut got = 0;
    loop {
        match consumer.try_peek(1).expect("asked") {
            Some(bytes) if bytes.is_empty() => break,
            Some(bytes) => {
                let part = bytes.first(1 + below(&mut random, 9000)).to_vec();
                assert!(part == stream(got, part.len()), "at {got}");
                consumer.consume(part.len());
                got += part.len();
            }
            None => {
                if consumer.prepare_to_poll().expect("prepared") {
                    assert!(is_ready_within(&consumer, TIMEOUT), "a lost wake-up");
                }
            }
        }
    }
    writing.join().expect("the writer");
    assert_eq!(got, total);
}

#[test]
fn every_mix_of_calls_delivers_the_stream() {
    for seed in 1..9 {
        let pair = Pair::new();
        let (mut producer, mut consumer) = (pair.producer, pair.consumer);
        drop((pair.reader, pair.writer));
        let total = 1_500_000;
        let writing = std::thread::spawn(move || {
            let mut random = Random(seed);
            let mut sent = 0;
            while sent < total {
                let most = [16, 300, 5_000, MAX_RECORD_BYTES][below(&mut random, 4)];
                let len_bytes = (1 + below(&mut random, most)).min(total - sent);
                let bytes = stream(sent, len_bytes);
                match below(&mut random, 3) {
                    0 => producer.write_all(&bytes).expect("written"),
                    1 => {
                        let mut grant = producer.reserve(len_bytes).expect("room");
                        grant.copy_from_slice(&bytes);
                        let part = 1 + below(&mut random, len_bytes);
                        grant.commit(part).expect("committed");
                        sent += part;
                        continue;
                    }
                    _ => {
                        if let Some(mut grant) = producer.try_reserve(len_bytes).expect("asked") {
                            grant.copy_from_slice(&bytes);
                            grant.commit(len_bytes).expect("committed");
                        } else {
                            continue;
                        }
                    }
                }
                sent += len_bytes;
            }
            let counters = producer.counters();
            producer.finish().expect("finished");
            counters
        });
        let mut random = Random(seed + 100);
        let mut got = 0;
        while got < total {
            let part = match below(&mut random, 2) {
                0 => {
                    let mut part = vec![0; 1 + below(&mut random, 7_000)];
                    let count = consumer.read(&mut part).expect("read");
                    part.truncate(count);
                    part
                }
                _ => {
                    let at_least = 1 + below(&mut random, MAX_RECORD_BYTES);
                    let bytes = consumer.peek(at_least).expect("read");
                    assert!(
                        bytes.len() >= at_least.min(total - got),
                        "{} of {at_least}",
                        bytes.len()
                    );
                    let part = bytes.first(1 + below(&mut random, at_least)).to_vec();
                    consumer.consume(part.len());
                    part
                }
            };
            assert!(part == stream(got, part.len()), "seed {seed} at {got}");
            got += part.len();
        }
        assert_eq!(consumer.read(&mut [0]).expect("read"), 0);
        let counters = writing.join().expect("the writer");
        assert_eq!(counters.bytes, total as u64);
        assert_eq!(counters.upgrades, 1, "{counters:?}");
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused_and_named() {
    let mut pair = Pair::upgraded();
    let asked = pair.producer.reserve(MAX_RECORD_BYTES + 1);
    let error = asked.expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("65537"), "{error}");
    assert!(pair.consumer.try_peek(MAX_RECORD_BYTES + 1).is_err());
    let longest = pair.producer.reserve(MAX_RECORD_BYTES).expect("fits");
    assert_eq!(longest.len(), MAX_RECORD_BYTES);
    for size_bytes in [0, 4096, 65536, 131_073, u32::MAX] {
        let bad = Options {
            size_bytes,
            ..Options::plain()
        };
        let stdin = io::stdin().as_fd().try_clone_to_owned().expect("copied");
        let error = Consumer::new(stdin, &bad);
        let inner = error.expect_err("refused").into_inner().expect("our own");
        assert_eq!(inner.downcast_ref(), Some(&RingError::Size(size_bytes)));
    }
}

#[test]
fn connect_makes_the_end_that_the_descriptor_is_open_for() {
    let (reader, writer) = io::pipe().expect("a pipe");
    let plain = Options::plain();
    let (end, other) = (
        connect(reader.into(), &plain),
        connect(writer.into(), &plain),
    );
    assert!(matches!(
        (end, other),
        (Ok(End::Consumer(_)), Ok(End::Producer(_)))
    ));
    let both = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .expect("opened");
    let error = connect(both.into(), &plain).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}
