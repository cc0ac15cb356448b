//! Programs that know nothing of rings, while their pipes become rings: what goes in comes out.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{MemfdFlags, memfd_create, sendfile};
use rustix::io::{Errno, dup};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use testkit::random::Random;

use super::debug::ring_of;
use crate::test;
use crate::test::{Context, Test};

/// Some turns of each.
pub const TESTS: &[Test] = &[
    test!(programs_go_on_when_their_pipes_become_rings, |cx| all(
        cx, 10
    ))
    .limit_s(120),
];

/// Many.
pub const LONG_TESTS: &[Test] = &[test!(
    a_thousand_times_programs_go_on_when_their_pipes_become_rings,
    |cx| all(cx, 1000)
)
.limit_s(1800)
.full()];

/// Bytes that go through, a few times what a pipe has room for.
const LEN_BYTES: usize = 200_003;

/// What is between the two pipes.
#[derive(Clone, Copy)]
enum Step {
    /// A command.
    Runs(&'static [&'static str]),
    /// A thread that calls a function until there is no more.
    Calls(fn(File, File) -> io::Result<()>),
}

/// Each reads a pipe to its end and writes what it has read to another.
const STEPS: &[(&str, Step)] = &[
    ("cat", Step::Runs(&["cat"])),
    ("dd", Step::Runs(&["dd", "bs=777", "status=none"])),
    (
        "dd of whole blocks",
        Step::Runs(&["dd", "bs=8192", "iflag=fullblock", "status=none"]),
    ),
    ("tee", Step::Runs(&["tee", "/dev/null"])),
    ("head", Step::Runs(&["head", "-c", "1000000"])),
    (
        "a shell with 2>&1",
        Step::Runs(&[
            "sh",
            "-c",
            "{ head -c 50000; head -c 50000 >&2; cat; } 2>&1",
        ]),
    ),
    ("io::copy", Step::Calls(copies)),
    ("splice to a socket, and from it", Step::Calls(by_a_socket)),
    ("sendfile", Step::Calls(by_a_file)),
];

fn all(_cx: &Context, turns: u64) -> Result<()> {
    for (name, step) in STEPS {
        for turn in 0..turns {
            passes(*step, Random(turn)).with_context(|| format!("{name}, turn {turn}"))?;
        }
    }
    for turn in 0..turns {
        tokens_of_make_come_back(Random(turn)).with_context(|| format!("make, turn {turn}"))?;
    }
    Ok(())
}

type Ends = (OwnedFd, OwnedFd);

fn new_pipe() -> Result<Ends> {
    pipe_with(PipeFlags::CLOEXEC).context("cannot make a pipe")
}

/// Makes a pipe a ring. What is in it always fits.
fn make_ring((reader, writer): &Ends) -> io::Result<()> {
    ring_of(reader, 0)?;
    ring_of(writer, 1)?;
    Ok(())
}

/// Runs one step; the pipes before and after it become rings at random moments.
fn passes(step: Step, mut random: Random) -> Result<()> {
    let data = random.bytes(LEN_BYTES);
    let (before, after) = (new_pipe()?, new_pipe()?);
    let (ring_before, ring_after) = (random.index(LEN_BYTES), random.index(LEN_BYTES));
    let mut sizes = Random(random.next_u64());
    let got = thread::scope(|scope| -> Result<Vec<u8>> {
        let (input, output) = (dup(&before.0)?, dup(&after.1)?);
        let mut child = None;
        let mut called = None;
        match step {
            Step::Runs(command) => {
                let started = Command::new(command[0])
                    .args(&command[1..])
                    .stdin(Stdio::from(input))
                    .stdout(Stdio::from(output))
                    .spawn();
                child = Some(started.context("cannot start it")?);
            }
            Step::Calls(function) => {
                called = Some(scope.spawn(move || function(input.into(), output.into())));
            }
        }
        let feeder = scope.spawn(|| feed(before, &data, ring_before, &mut sizes));
        let got = drain(after, ring_after, &mut random);
        feeder
            .join()
            .map_err(|_| anyhow!("the feeder panicked"))?
            .context("what goes in")?;
        if let Some(called) = called {
            called
                .join()
                .map_err(|_| anyhow!("it panicked"))?
                .context("it failed")?;
        }
        if let Some(mut child) = child {
            let status = child.wait().context("cannot wait for it")?;
            ensure!(status.success(), "it ended with {status}");
        }
        got.context("what comes out")
    })?;
    let same = got.iter().zip(&data).take_while(|(a, b)| a == b).count();
    ensure!(
        got == data,
        "of {} bytes {} came, the first {same} as they were",
        data.len(),
        got.len()
    );
    Ok(())
}

fn feed(ends: Ends, data: &[u8], ring_at: usize, random: &mut Random) -> io::Result<()> {
    let mut writer = File::from(dup(&ends.1)?);
    let mut ends = Some(ends);
    let mut at = 0;
    while at < data.len() {
        let len = (1 + random.index(9000)).min(data.len() - at);
        writer.write_all(&data[at..at + len])?;
        at += len;
        if at > ring_at
            && let Some(ends) = ends.take()
        {
            make_ring(&ends)?;
        }
    }
    Ok(())
}

fn drain(ends: Ends, ring_at: usize, random: &mut Random) -> io::Result<Vec<u8>> {
    let mut reader = File::from(dup(&ends.0)?);
    let mut ends = Some(ends);
    let mut got = Vec::new();
    let mut buffer = vec![0; 9000];
    loop {
        if got.len() >= ring_at
            && let Some(ends) = ends.take()
        {
            make_ring(&ends)?;
        }
        let len = 1 + random.index(buffer.len());
        let n = reader.read(&mut buffer[..len])?;
        if n == 0 {
            return Ok(got);
        }
        got.extend_from_slice(&buffer[..n]);
    }
}

fn copies(mut input: File, mut output: File) -> io::Result<()> {
    io::copy(&mut input, &mut output).map(drop)
}

/// As proxies do.
fn by_a_socket(input: File, output: File) -> io::Result<()> {
    let (near, far) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    thread::scope(|scope| {
        let back = scope.spawn(move || {
            while splice(&far, None, &output, None, 30_000, SpliceFlags::empty())? > 0 {}
            Ok::<_, Errno>(())
        });
        while splice(&input, None, &near, None, 30_000, SpliceFlags::empty())? > 0 {}
        drop(near);
        back.join()
            .map_err(|_| io::Error::other("the other half panicked"))??;
        Ok(())
    })
}

/// As servers of files do.
fn by_a_file(mut input: File, output: File) -> io::Result<()> {
    let mut file = File::from(memfd_create("between", MemfdFlags::CLOEXEC)?);
    let mut left = usize::try_from(io::copy(&mut input, &mut file)?).map_err(io::Error::other)?;
    let mut at = 0;
    while left > 0 {
        left -= sendfile(&output, &file, Some(&mut at), left)?;
    }
    Ok(())
}

/// make's jobs take their tokens from a pipe and put them back.
fn tokens_of_make_come_back(mut random: Random) -> Result<()> {
    const TOKENS: usize = 3;
    const RULES: &str =
        ".PHONY: all a b c d e f g h\nall: a b c d e f g h\na b c d e f g h:\n\t@echo $@\n";
    let jobs = new_pipe()?;
    rustix::io::write(&jobs.1, &[b'+'; TOKENS]).context("cannot write the tokens")?;
    // As a make that has this one as a job would start it.
    let script = "exec 3<&0 4>&2; printf '%s' \"$RULES\" | \
        MAKEFLAGS=' -j4 --jobserver-auth=3,4' make -s -f - 2>/dev/null";
    let mut make = Command::new("sh")
        .args(["-c", script])
        .env("RULES", RULES)
        .stdin(Stdio::from(dup(&jobs.0)?))
        .stdout(Stdio::piped())
        .stderr(Stdio::from(dup(&jobs.1)?))
        .spawn()
        .context("cannot start make")?;
    let mut said = make.stdout.take().context("it has no output")?;
    let mut got = String::new();
    let mut letter = [0; 2];
    let ring_at = random.index(8);
    for at in 0..8 {
        if at == ring_at {
            make_ring(&jobs).context("cannot make a ring")?;
        }
        said.read_exact(&mut letter)
            .context("it has not done all")?;
        got.push(char::from(letter[0]));
    }
    let status = make.wait().context("cannot wait for make")?;
    ensure!(status.success(), "make ended with {status}");
    let mut tokens = Vec::new();
    while poll(
        &mut [PollFd::new(&jobs.0, PollFlags::IN)],
        Some(&rustix::time::Timespec::default()),
    )? > 0
    {
        let mut token = [0; TOKENS + 1];
        let n = rustix::io::read(&jobs.0, &mut token)?;
        tokens.extend_from_slice(&token[..n]);
    }
    ensure!(tokens == [b'+'; TOKENS], "the tokens are {tokens:?}");
    Ok(())
}
