//! Rings between two ends in one process, by the transport that `common` says; what is peculiar to the shared transport
//! always by that, with a registry of each test's own.

mod common;

use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use common::{options, transport};
use fd_ring::{Consumer, End, MAX_RECORD_BYTES, Options, Producer, RingError, Transport, connect};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

struct Pair {
    producer: Producer,
    consumer: Consumer,
    /// More descriptors of the same pipe.
    reader: PipeReader,
    writer: PipeWriter,
    transport: Transport,
    options: Options,
    _dir: TempDir,
}

impl Pair {
    fn new() -> Self {
        Self::by(transport())
    }

    fn by(transport: Transport) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let options = options(transport, &dir);
        let (reader, writer) = io::pipe().expect("a pipe");
        let copy = writer.try_clone().expect("copied");
        let producer = Producer::new(copy.into(), &options).expect("a producer");
        let copy = reader.try_clone().expect("copied");
        let consumer = Consumer::new(copy.into(), &options).expect("a consumer");
        Self {
            producer,
            consumer,
            reader,
            writer,
            transport,
            options,
            _dir: dir,
        }
    }

    /// A pair whose ends have met.
    fn upgraded() -> Self {
        let mut pair = Self::new();
        pair.upgrade();
        pair
    }

    fn upgrade(&mut self) {
        for _ in 0..1000 {
            self.producer.upgrade(Duration::ZERO).expect("asked");
            self.consumer.upgrade(Duration::ZERO).expect("asked");
            if self.transports() == (self.transport, self.transport) {
                return;
            }
        }
        panic!("the ends do not meet: {:?}", self.transports());
    }

    fn transports(&self) -> (Transport, Transport) {
        (self.producer.transport(), self.consumer.transport())
    }
}

/// Numbers that do not repeat soon.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).expect("small")
    }
}

/// The byte at a place of the stream that all tests send.
fn byte(place: usize) -> u8 {
    (place.wrapping_mul(2_654_435_761) >> 11).to_le_bytes()[0]
}

fn stream(from: usize, len_bytes: usize) -> Vec<u8> {
    (from..from + len_bytes).map(byte).collect()
}

#[test]
fn the_two_ends_meet_whoever_comes_first_and_say_so() {
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
    // The pipe as full as a writer can make it without waiting.
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
fn a_reader_that_knows_nothing_gets_the_bytes_and_the_end() {
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
fn a_writer_that_knows_nothing_is_read_to_its_end() {
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
fn a_producer_that_leaves_is_the_end_after_its_last_byte() {
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
fn a_sleeping_consumer_hears_that_the_producer_left() {
    let pair = Pair::upgraded();
    drop(pair.writer);
    let mut consumer = pair.consumer;
    let reading = std::thread::spawn(move || consumer.peek(1).map(|bytes| bytes.len()));
    // Long enough for it to sleep, in the futex and then in poll.
    std::thread::sleep(Duration::from_millis(60));
    drop(pair.producer);
    assert_eq!(reading.join().expect("the reader").expect("read"), 0);
}

#[test]
fn a_consumer_that_leaves_breaks_the_pipe_of_a_producer_that_writes_or_sleeps() {
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
fn what_a_consumer_that_leaves_has_not_taken_goes_to_the_next_reader() {
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
    // The kernel's ring is for one consumer at a time; another one waits until its offer comes.
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
fn a_second_producer_beside_the_first_writes_to_the_pipe_and_is_heard() {
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
fn a_record_of_which_a_part_is_in_the_ring_and_the_rest_comes_by_the_pipe_is_one() {
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

/// Whether it can be read at this moment.
fn is_ready(fd: &impl AsFd) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).expect("polled") != 0
}

#[test]
fn who_polls_for_a_whole_record_is_not_told_of_its_first_half_again_and_again() {
    let mut pair = Pair::upgraded();
    pair.producer.write_all(b"half a ").expect("written");
    let mut ready = 0;
    for _ in 0..10 {
        assert!(pair.consumer.try_peek(13).expect("asked").is_none());
        if pair.consumer.prepare_to_poll().expect("prepared") {
            ready += usize::from(is_ready(&pair.consumer));
        }
    }
    assert!(ready <= 1, "{ready} times of 10");
    pair.producer.write_all(b"record").expect("written");
    assert!(is_ready(&pair.consumer), "a lost wake-up");
    let bytes = pair.consumer.try_peek(13).expect("asked");
    assert_eq!(bytes.expect("there").to_vec(), b"half a record");
}

#[test]
fn a_producer_whose_bytes_were_all_taken_ends_well_and_one_with_bytes_left_does_not() {
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
fn a_producer_that_is_dropped_leaves_what_its_consumer_left_to_the_next_reader() {
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

#[test]
fn an_upgrade_may_be_waited_for_for_ever() {
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
fn a_file_is_read_right_into_the_room_and_no_further() {
    for upgraded in [false, true] {
        let mut pair = match upgraded {
            true => Pair::upgraded(),
            false => Pair::new(),
        };
        let (file, mut source) = io::pipe().expect("a pipe");
        source.write_all(&stream(3, 40)).expect("written");
        let mut room = pair.producer.reserve(20).expect("room");
        room.put(0, &stream(0, 3));
        assert_eq!(room.read_from(3, &file).expect("read"), 17);
        assert_eq!(room.read_from(20, &file).expect("read"), 0, "no room");
        assert_eq!(room.read_from(99, &file).expect("read"), 0, "no room");
        room.commit(20).expect("committed");
        let bytes = pair.consumer.peek(20).expect("read");
        assert!(bytes.to_vec() == stream(0, 20));
    }
}

#[test]
fn more_than_was_reserved_cannot_be_written() {
    for upgraded in [false, true] {
        for (offset, len_bytes) in [(0, 17), (16, 1), (usize::MAX, 2)] {
            let mut pair = match upgraded {
                true => Pair::upgraded(),
                false => Pair::new(),
            };
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
    let wait = |fd: &dyn AsFd| {
        let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
        let limit = Timespec::try_from(PATIENCE).expect("a time");
        assert_ne!(
            poll(&mut fds, Some(&limit)).expect("polled"),
            0,
            "a lost wake-up"
        );
    };
    let writing = std::thread::spawn(move || {
        let mut random = Random(77);
        let mut sent = 0;
        while sent < total {
            let len_bytes = (1 + random.below(5000)).min(total - sent);
            match producer
                .try_write(&stream(sent, len_bytes))
                .expect("written")
            {
                Some(count) => sent += count,
                None if producer.prepare_to_poll().expect("prepared") => wait(&producer),
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
                let part = bytes.first(1 + random.below(9000)).to_vec();
                assert!(part == stream(got, part.len()), "at {got}");
                consumer.consume(part.len());
                got += part.len();
            }
            None => {
                if consumer.prepare_to_poll().expect("prepared") {
                    wait(&consumer);
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
                let most = [16, 300, 5_000, MAX_RECORD_BYTES][random.below(4)];
                let len_bytes = (1 + random.below(most)).min(total - sent);
                let bytes = stream(sent, len_bytes);
                match random.below(3) {
                    0 => producer.write_all(&bytes).expect("written"),
                    1 => {
                        let mut grant = producer.reserve(len_bytes).expect("room");
                        grant.copy_from_slice(&bytes);
                        let part = 1 + random.below(len_bytes);
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
            let part = match random.below(2) {
                0 => {
                    let mut part = vec![0; 1 + random.below(7_000)];
                    let count = consumer.read(&mut part).expect("read");
                    part.truncate(count);
                    part
                }
                _ => {
                    let at_least = 1 + random.below(MAX_RECORD_BYTES);
                    let bytes = consumer.peek(at_least).expect("read");
                    assert!(
                        bytes.len() >= at_least.min(total - got),
                        "{} of {at_least}",
                        bytes.len()
                    );
                    let part = bytes.first(1 + random.below(at_least)).to_vec();
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
fn what_does_not_fit_is_refused_with_its_size() {
    let mut pair = Pair::upgraded();
    let error = pair
        .producer
        .reserve(MAX_RECORD_BYTES + 1)
        .expect_err("too long");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("65537"), "{error}");
    assert!(pair.consumer.try_peek(MAX_RECORD_BYTES + 1).is_err());
    assert_eq!(
        pair.producer.reserve(MAX_RECORD_BYTES).expect("fits").len(),
        MAX_RECORD_BYTES
    );
    for size_bytes in [0, 4096, 65536, 131_073, u32::MAX] {
        let bad = Options {
            size_bytes,
            ..Options::plain()
        };
        let error = Consumer::new(
            io::stdin().as_fd().try_clone_to_owned().expect("copied"),
            &bad,
        );
        let inner = error.expect_err("refused").into_inner().expect("our own");
        assert_eq!(inner.downcast_ref(), Some(&RingError::Size(size_bytes)));
    }
}

#[test]
fn connect_takes_the_end_that_the_descriptor_is() {
    let (reader, writer) = io::pipe().expect("a pipe");
    let plain = Options::plain();
    assert!(matches!(
        connect(reader.into(), &plain),
        Ok(End::Consumer(_))
    ));
    assert!(matches!(
        connect(writer.into(), &plain),
        Ok(End::Producer(_))
    ));
    let both = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .expect("opened");
    let error = connect(both.into(), &plain).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[test]
fn what_is_no_pipe_is_read_and_written_plainly() {
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
