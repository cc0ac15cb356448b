//! Two ends in this process, and the stream that they exchange.

use std::io::{self, PipeReader, PipeWriter};
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

    /// A pair with a ring.
    pub fn upgraded() -> Self {
        let mut pair = Self::new();
        pair.upgrade();
        pair
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
