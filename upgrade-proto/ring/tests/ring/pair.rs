//! Two ends in this process, and the stream that they exchange.

use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::time::Duration;

use fd_ring::{Consumer, Options, Producer, Transport};
use tempfile::TempDir;

use crate::common::{options, transport};
use crate::tools::Random;

pub struct Pair {
    pub producer: Producer,
    pub consumer: Consumer,
    /// More descriptors of the same pipe.
    pub reader: PipeReader,
    pub writer: PipeWriter,
    pub transport: Transport,
    pub options: Options,
    _dir: TempDir,
}

impl Pair {
    pub fn new() -> Self {
        Self::by(transport())
    }

    pub fn by(transport: Transport) -> Self {
        Self::made_in_order(transport, false)
    }

    pub fn made_in_order(transport: Transport, consumer_first: bool) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let options = options(transport, &dir);
        let (reader, writer) = io::pipe().expect("a pipe");
        let produce = || {
            let copy = writer.try_clone().expect("copied");
            Producer::new(copy.into(), &options).expect("a producer")
        };
        let consume = || {
            let copy = reader.try_clone().expect("copied");
            Consumer::new(copy.into(), &options).expect("a consumer")
        };
        let (producer, consumer) = match consumer_first {
            true => {
                let consumer = consume();
                (produce(), consumer)
            }
            false => (produce(), consume()),
        };
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

    /// A pair with a ring.
    pub fn upgraded() -> Self {
        Self::upgraded_by(transport())
    }

    pub fn upgraded_by(transport: Transport) -> Self {
        let mut pair = Self::by(transport);
        pair.upgrade();
        pair
    }

    /// A pair without a ring, and one with a ring.
    pub fn both() -> [Self; 2] {
        [Self::new(), Self::upgraded()]
    }

    pub fn upgrade(&mut self) {
        for _ in 0..1000 {
            self.producer.upgrade(Duration::ZERO).expect("asked");
            self.consumer.upgrade(Duration::ZERO).expect("asked");
            if self.transports() == (self.transport, self.transport) {
                return;
            }
        }
        panic!("the ends do not meet: {:?}", self.transports());
    }

    pub fn transports(&self) -> (Transport, Transport) {
        (self.producer.transport(), self.consumer.transport())
    }

    /// Writes all of it at the producer.
    pub fn write(&mut self, bytes: impl AsRef<[u8]>) {
        self.producer.write_all(bytes.as_ref()).expect("written");
    }

    /// Reads so many bytes at the consumer.
    pub fn read(&mut self, len_bytes: usize) -> Vec<u8> {
        let mut got = vec![0; len_bytes];
        self.consumer.read_exact(&mut got).expect("read");
        got
    }

    /// What is readable at the consumer, at least so many bytes.
    pub fn peek(&mut self, at_least: usize) -> Vec<u8> {
        self.consumer.peek(at_least).expect("read").to_vec()
    }

    /// Closes the writing end, and reads at the consumer what is left.
    pub fn end_of_stream(mut self) -> Vec<u8> {
        drop((self.producer, self.writer));
        rest(&mut self.consumer)
    }
}

/// Reads to the end.
pub fn rest(from: &mut impl Read) -> Vec<u8> {
    let mut got = Vec::new();
    from.read_to_end(&mut got).expect("read");
    got
}

/// The byte at an offset of the stream that all tests send.
pub fn byte(place: usize) -> u8 {
    (place.wrapping_mul(2_654_435_761) >> 11).to_le_bytes()[0]
}

pub fn stream(from: usize, len_bytes: usize) -> Vec<u8> {
    (from..from + len_bytes).map(byte).collect()
}

/// A number below `bound`.
pub fn below(random: &mut Random, bound: usize) -> usize {
    usize::try_from(random.next() % bound as u64).expect("small")
}
