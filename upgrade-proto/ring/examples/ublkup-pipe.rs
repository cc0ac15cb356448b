//! Copies a file through a pipe, or through a ring that replaces it: `ublkup-pipe produce FILE | ublkup-pipe consume`.
//!
//! Either of the two can be another program, as `cat`; the same bytes arrive.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use fd_ring::{Consumer, Counters, MAX_RECORD_BYTES, Options, Producer, Transport};

/// Copies bytes through a pipe, or through a ring in its place
#[derive(Parser)]
#[command(name = "ublkup-pipe")]
struct CommandLine {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Copies a file to the pipe that is standard output
    Produce {
        /// The file; `-` or nothing is standard input
        #[arg(default_value = "-")]
        file: PathBuf,
        #[command(flatten)]
        shared: Shared,
    },
    /// Copies the pipe that is standard input to standard output
    Consume {
        #[command(flatten)]
        shared: Shared,
    },
}

#[derive(Args)]
struct Shared {
    /// Copy records of this size, at most 65536; by default as many bytes as there are
    #[arg(long, value_name = "BYTES")]
    records: Option<usize>,
    /// The ring to use beside the plain pipe
    #[arg(long, value_enum, default_value_t = Allowed::Auto)]
    way: Allowed,
    /// Ask the kernel for a ring first; for kernels with the ringbuffer series only (system calls 473 and 474)
    #[arg(long)]
    kernel: bool,
    /// Wait for the other end before the first byte, at most so long
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    wait: f64,
    /// Bytes of the ring: a power of two from 131072
    #[arg(long, value_name = "BYTES")]
    size: Option<u32>,
    /// The directory of the registry, instead of the default ones
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// Print the transport that was used, and counts, to standard error
    #[arg(long)]
    stats: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Allowed {
    /// The best that both ends have; the kernel's ring only with --kernel
    Auto,
    /// The kernel's ring
    Kernel,
    /// A ring in memory that the two processes share
    Shared,
    /// read(2) and write(2)
    Plain,
}

impl Shared {
    fn options(&self) -> Options {
        let mut options = Options {
            kernel: self.way == Allowed::Kernel || self.kernel && self.way == Allowed::Auto,
            shared: matches!(self.way, Allowed::Auto | Allowed::Shared),
            ..Options::default()
        };
        if let Some(size) = self.size {
            options.size_bytes = size;
        }
        if let Some(dir) = &self.runtime_dir {
            options.offer.runtime_dir = Some(dir.clone());
            options.lookup.runtime_dirs = vec![dir.clone()];
        }
        options
    }

    fn wait_limit(&self) -> io::Result<Duration> {
        Duration::try_from_secs_f64(self.wait).map_err(io::Error::other)
    }

    fn record_bytes(&self) -> io::Result<Option<usize>> {
        match self.records {
            Some(size) if size == 0 || size > MAX_RECORD_BYTES => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("--records {size}: choose from 1 to {MAX_RECORD_BYTES}"),
            )),
            records => Ok(records),
        }
    }

    fn report(&self, role: &str, ring: Option<Transport>, counters: &Counters) {
        if self.stats {
            let way = match ring {
                Some(Transport::Kernel) => "kernel",
                Some(Transport::Shared) => "shared",
                Some(Transport::Plain) | None => "plain",
            };
            eprintln!(
                "ublkup-pipe {role}: way={way} bytes={} ring_bytes={} system_calls={} wakes={} sleeps={}",
                counters.bytes,
                counters.ring_bytes,
                counters.system_calls,
                counters.wakes,
                counters.sleeps
            );
        }
    }
}

fn produce(file: &PathBuf, shared: &Shared) -> io::Result<()> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let records = shared.record_bytes()?;
    let source = match file.as_os_str() == "-" {
        true => File::from(io::stdin().as_fd().try_clone_to_owned()?),
        false => File::open(file).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("cannot open {}: {error}", file.display()),
            )
        })?,
    };
    let mut producer = Producer::new(stdout, &shared.options())?;
    producer.upgrade(shared.wait_limit()?)?;
    let sent = match records {
        None => send_stream(&source, &mut producer),
        Some(size) => send_records(&source, &mut producer, size),
    };
    let flushed = sent.and_then(|()| producer.flush());
    shared.report("produce", producer.last_ring(), &producer.counters());
    flushed.and_then(|()| producer.finish())
}

/// Reads the file directly into the ring.
fn send_stream(source: &File, producer: &mut Producer) -> io::Result<()> {
    loop {
        let mut room = producer.reserve(MAX_RECORD_BYTES)?;
        let count = room.read_from(0, source)?;
        room.commit(count)?;
        if count == 0 {
            return Ok(());
        }
    }
}

fn send_records(source: &File, producer: &mut Producer, size: usize) -> io::Result<()> {
    let mut buffered = io::BufReader::with_capacity(MAX_RECORD_BYTES, source);
    let mut record = Vec::with_capacity(size);
    loop {
        record.clear();
        let count = buffered
            .by_ref()
            .take(size as u64)
            .read_to_end(&mut record)?;
        let mut room = producer.reserve(count)?;
        room.copy_from_slice(&record);
        room.commit(count)?;
        if count < size {
            return Ok(());
        }
    }
}

fn consume(shared: &Shared) -> io::Result<()> {
    let stdin = io::stdin().as_fd().try_clone_to_owned()?;
    let at_least = shared.record_bytes()?.unwrap_or(1);
    let mut target = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut consumer = Consumer::new(stdin, &shared.options())?;
    consumer.upgrade(shared.wait_limit()?)?;
    let mut buffer = vec![0; MAX_RECORD_BYTES];
    let received = loop {
        let bytes = match consumer.peek(at_least) {
            Ok(bytes) => bytes,
            Err(error) => break Err(error),
        };
        let there = bytes.len();
        // Whole records, except for the last one.
        let whole = match there < at_least {
            true => there,
            false => there.min(buffer.len()) / at_least * at_least,
        };
        let count = bytes.first(whole).copy_to(&mut buffer);
        if count == 0 {
            break Ok(());
        }
        consumer.consume(count);
        if let Err(error) = target.write_all(&buffer[..count]) {
            break Err(error);
        }
    };
    shared.report("consume", consumer.last_ring(), &consumer.counters());
    received
}

fn main() -> ExitCode {
    let done = match &CommandLine::parse().role {
        Role::Produce { file, shared } => produce(file, shared),
        Role::Consume { shared } => consume(shared),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ublkup-pipe: {error}");
            ExitCode::FAILURE
        }
    }
}
