//! Races on addresses in an open file: everything that can happen to such a socket, at once and
//! counted. What is asserted is that every error is one of those documented, that each kind of
//! success happened, and that nothing is left; the kernel's own checks do the rest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Error, PipeReader, PipeWriter, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use testkit::random::Random;
use testkit::vhost::raw;
use testkit::wait::until;

use crate::test;
use crate::test::{Context, Test};

/// Short, for every run.
pub const TESTS: &[Test] = &[
    test!(races_end_with_documented_errors_and_leave_nothing, |cx| {
        race(cx, 60_000, 5)
    })
    .limit_s(200),
];

/// As many as an hour has at a hundred operations a second, with a new disk every minute.
pub const LONG_TESTS: &[Test] = &[test!(
    an_hours_worth_of_races_ends_with_documented_errors_and_leaves_nothing,
    |cx| race(cx, 360_000, 60)
)
.limit_s(1500)];

/// Few, so that they meet.
const NAMES: [&str; 3] = ["a", "b", "vhost-user-blk"];
const PIPES: usize = 4;

/// Everything the threads share.
struct Arena {
    pipes: [Mutex<Option<(PipeReader, PipeWriter)>>; PIPES],
    /// The newest disk: as long as an old one is open, the new one has another number.
    disk: Mutex<PathBuf>,
    /// Operations to do, of the quick kind.
    operations: u64,
    done: AtomicU64,
    /// Disks to come and go.
    rounds: u64,
    rounds_done: AtomicU64,
    failed: AtomicBool,
    counts: Mutex<BTreeMap<String, u64>>,
}

/// One thread's results; added to the arena's when it ends.
struct Tally<'a> {
    arena: &'a Arena,
    counts: BTreeMap<String, u64>,
}

impl Arena {
    fn is_over(&self) -> bool {
        let is_done = self.done.load(Ordering::Relaxed) >= self.operations
            && self.rounds_done.load(Ordering::Relaxed) >= self.rounds;
        is_done || self.failed.load(Ordering::Relaxed)
    }

    fn tally(&self) -> Tally<'_> {
        Tally {
            arena: self,
            counts: BTreeMap::new(),
        }
    }

    /// The number of one end of one pipe, which another thread may close before it is used: then it
    /// is nothing, or something else.
    fn end(&self, random: &mut Random) -> Option<RawFd> {
        let pipe = self.pipes[random.index(PIPES)].lock().ok()?;
        let (reader, writer) = pipe.as_ref()?;
        Some(if random.index(2) == 0 {
            reader.as_raw_fd()
        } else {
            writer.as_raw_fd()
        })
    }
}

impl Tally<'_> {
    /// Notes a result, whose error must be one of `allowed`.
    fn note<T>(
        &mut self,
        what: &str,
        result: Result<T, Error>,
        allowed: &[i32],
    ) -> Result<Option<T>> {
        self.arena.done.fetch_add(1, Ordering::Relaxed);
        let (outcome, value) = match result {
            Ok(value) => ("done".into(), Some(value)),
            Err(error) => {
                let known = error.raw_os_error().filter(|code| allowed.contains(code));
                ensure!(known.is_some(), "{what}: {error} is not documented");
                (error.to_string(), None)
            }
        };
        *self.counts.entry(format!("{what}: {outcome}")).or_default() += 1;
        Ok(value)
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        if let Ok(mut all) = self.arena.counts.lock() {
            for (what, count) in &self.counts {
                *all.entry(what.clone()).or_default() += count;
            }
        }
    }
}

fn address(fd: RawFd, random: &mut Random) -> String {
    format!("/dev/self/fd/{fd}/{}", NAMES[random.index(NAMES.len())])
}

/// Not a socket's object any more, or another thing by now, or taken.
const BIND_ERRORS: [i32; 4] = [
    libc::EBADF,
    libc::EOPNOTSUPP,
    libc::EADDRINUSE,
    libc::ENODEV,
];
const CONNECT_ERRORS: [i32; 4] = [
    libc::EBADF,
    libc::ECONNREFUSED,
    libc::EPROTOTYPE,
    libc::EAGAIN,
];

/// Binds streams and datagrams at ends of pipes, takes what comes, and closes.
fn serve_pipes(arena: &Arena, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut tally = arena.tally();
    while !arena.is_over() {
        let Some(fd) = arena.end(&mut random) else {
            continue;
        };
        let address = address(fd, &mut random);
        if random.index(4) == 0 {
            let bound = UnixDatagram::bind(&address);
            if let Some(socket) = tally.note("bind a datagram socket", bound, &BIND_ERRORS)? {
                socket.set_nonblocking(true)?;
                std::thread::yield_now();
                while socket.recv(&mut [0; 8]).is_ok() {}
            }
            continue;
        }
        let bound = UnixListener::bind(&address);
        if let Some(listener) = tally.note("bind a stream socket", bound, &BIND_ERRORS)? {
            listener.set_nonblocking(true)?;
            for _ in 0..random.index(4) {
                std::thread::yield_now();
                // There may be no connection.
                if let Ok((stream, _)) = listener.accept() {
                    tally.note("accept", Ok(()), &[])?;
                    drop(stream);
                }
            }
        }
    }
    Ok(())
}

/// Connects to ends of pipes.
fn visit_pipes(arena: &Arena, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut tally = arena.tally();
    let sender = UnixDatagram::unbound()?;
    sender.set_nonblocking(true)?;
    while !arena.is_over() {
        let Some(fd) = arena.end(&mut random) else {
            continue;
        };
        let address = address(fd, &mut random);
        if random.index(4) == 0 {
            let sent = sender.send_to(b"hello", &address);
            tally.note("send", sent, &CONNECT_ERRORS)?;
        } else {
            let connected = UnixStream::connect(&address);
            tally.note("connect", connected, &CONNECT_ERRORS)?;
        }
    }
    Ok(())
}

/// Replaces pipes while others use their numbers.
fn renew_pipes(arena: &Arena, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut tally = arena.tally();
    while !arena.is_over() {
        let fresh = std::io::pipe()?;
        let slot = &arena.pipes[random.index(PIPES)];
        let old = slot.lock().ok().and_then(|mut slot| slot.replace(fresh));
        // Closed here, outside the lock.
        drop(old);
        tally.note("renew a pipe", Ok(()), &[])?;
        std::thread::yield_now();
    }
    Ok(())
}

/// Sockets that hold, in flight, the ends of the pipe they are bound at: only the garbage collector
/// can end them.
fn leave_cycles(arena: &Arena) -> Result<()> {
    let mut tally = arena.tally();
    while !arena.is_over() {
        let (reader, writer) = std::io::pipe()?;
        let listener = UnixListener::bind(format!("/dev/self/fd/{}/cycle", reader.as_raw_fd()))?;
        let client = UnixStream::connect(format!("/dev/self/fd/{}/cycle", writer.as_raw_fd()))?;
        let ends = [reader.as_fd(), writer.as_fd(), listener.as_fd()];
        raw::send(&client, b"x", &ends).context("cannot pass descriptors")?;
        drop((client, reader, writer, listener));
        tally.note("leave a cycle", Ok(()), &[])?;
        std::thread::yield_now();
    }
    Ok(())
}

/// Lists all sockets, as `ss` does.
fn look_on(arena: &Arena) -> Result<()> {
    let mut tally = arena.tally();
    while !arena.is_over() {
        let seen = fs::read_to_string("/proc/net/unix")?;
        if seen.contains("/dev/self/fd/pipe:[") {
            tally.note("see a pipe's socket", Ok(()), &[])?;
        }
        if seen.contains("/dev/self/fd/blk:[") {
            tally.note("see a disk's socket", Ok(()), &[])?;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Starts and stops a server, so that its disk comes and goes.
fn renew_disk(cx: &Context, arena: &Arena) -> Result<()> {
    let mut tally = arena.tally();
    while !arena.is_over() {
        let server = cx.serve().ublk("yes").arg("disk=mem:4M").start()?;
        let disk = server.block_device()?;
        if let Ok(mut newest) = arena.disk.lock() {
            *newest = disk;
        }
        std::thread::sleep(Duration::from_millis(20));
        server.stop()?;
        tally.note("renew the disk", Ok(()), &[])?;
        arena.rounds_done.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Connects to the disk's server, and binds beside it, through descriptors of the disk that may be
/// those of one that has gone.
fn visit_disk(arena: &Arena, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    let mut tally = arena.tally();
    let mut kept: Vec<File> = Vec::new();
    while !arena.is_over() {
        let newest = arena
            .disk
            .lock()
            .map(|disk| disk.clone())
            .unwrap_or_default();
        let opened = File::options().read(true).write(true).open(newest);
        let missing = [libc::ENOENT, libc::ENXIO, libc::ENODEV, libc::EBUSY];
        if let Some(disk) = tally.note("open the disk", opened, &missing)? {
            if kept.len() >= 4 {
                kept.remove(random.index(4));
            }
            kept.push(disk);
        } else {
            std::thread::sleep(Duration::from_millis(1));
        }
        for disk in &kept {
            let address = address(disk.as_raw_fd(), &mut random);
            if random.index(3) == 0 {
                let bound = UnixListener::bind(&address);
                tally.note("bind at the disk", bound, &BIND_ERRORS)?;
            } else if let Some(mut stream) = tally.note(
                "connect to the disk",
                UnixStream::connect(&address),
                &CONNECT_ERRORS,
            )? {
                // A session that begins with nonsense; the server may have left already.
                let _refused = stream.write_all(b"nonsense");
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Sockets of this kind in the whole guest.
fn anchored_sockets() -> Result<usize> {
    let all = fs::read_to_string("/proc/net/unix")?;
    Ok(all.matches("/dev/self/fd/").count())
}

fn race(cx: &Context, operations: u64, rounds: u64) -> Result<()> {
    let before = anchored_sockets()?;
    let arena = Arena {
        pipes: std::array::from_fn(|_| Mutex::new(None)),
        disk: Mutex::new("/dev/ublkb0".into()),
        operations,
        done: AtomicU64::new(0),
        rounds,
        rounds_done: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        counts: Mutex::new(BTreeMap::new()),
    };
    let arena = &arena;
    // The first that fails ends all.
    let run = |result: Result<()>| {
        if result.is_err() {
            arena.failed.store(true, Ordering::Relaxed);
        }
        result
    };
    let ran: Vec<Result<()>> = std::thread::scope(|scope| {
        let mut threads = vec![
            scope.spawn(move || run(renew_pipes(arena, 1))),
            scope.spawn(move || run(leave_cycles(arena))),
            scope.spawn(move || run(look_on(arena))),
            scope.spawn(move || run(renew_disk(cx, arena))),
            scope.spawn(move || run(visit_disk(arena, 2))),
            scope.spawn(move || run(visit_disk(arena, 3))),
        ];
        for seed in 0..3 {
            threads.push(scope.spawn(move || run(serve_pipes(arena, 10 + seed))));
            threads.push(scope.spawn(move || run(visit_pipes(arena, 20 + seed))));
        }
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    });
    let counts = arena.counts.lock().map(|counts| counts.clone());
    let counts = counts.unwrap_or_default();
    for (what, count) in &counts {
        println!("{count:9} {what}");
    }
    ran.into_iter().collect::<Result<()>>()?;
    for what in [
        "accept",
        "bind a datagram socket",
        "bind a stream socket",
        "bind at the disk",
        "connect",
        "connect to the disk",
        "leave a cycle",
        "open the disk",
        "renew a pipe",
        "renew the disk",
        "see a disk's socket",
        "see a pipe's socket",
        "send",
    ] {
        ensure!(
            counts.contains_key(&format!("{what}: done")),
            "never: {what}"
        );
    }
    for pipe in &arena.pipes {
        drop(pipe.lock().map(|mut pipe| pipe.take()));
    }
    // Cycles go when the collector comes, which closing a socket asks for.
    until("no socket is left", Duration::from_secs(10), || {
        drop(UnixStream::pair()?);
        Ok(anchored_sockets()? <= before)
    })
}
