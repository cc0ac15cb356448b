//! On kernels that find mistakes: nothing leaks, and an allocation that fails is an error like
//! another. KASAN, lockdep and the rest speak through the kernel's log, which every test's end looks
//! at.

use std::fs::{self, File};
use std::io::{Error, Read as _, Write as _};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::test;
use crate::test::{Context, Test};

/// Before the others.
pub const FIRST: &[Test] = &[test!(the_checkers_are_at_work).limit_s(100)];

/// After the others.
pub const LAST: &[Test] = &[
    test!(allocations_that_fail_are_errors_like_others).limit_s(900),
    test!(nothing_has_leaked).limit_s(100),
    test!(lockdep_has_not_given_up),
];

const KMEMLEAK: &str = "/sys/kernel/debug/kmemleak";
const FAILSLAB: &str = "/sys/kernel/debug/failslab";

/// What is looked at later must be there; and what leaked while booting is not of interest.
fn the_checkers_are_at_work(cx: &Context) -> Result<()> {
    ensure!(Path::new(FAILSLAB).is_dir(), "no failslab");
    ensure!(
        fs::read_to_string("/proc/kallsyms")?.contains(" __asan_report_load8"),
        "no KASAN"
    );
    scan()?;
    fs::write(KMEMLEAK, "clear").context("cannot forget leaks")?;
    lockdep_has_not_given_up(cx)
}

fn lockdep_has_not_given_up(_cx: &Context) -> Result<()> {
    let stats = fs::read_to_string("/proc/lockdep_stats").context("no lockdep")?;
    let on = stats
        .lines()
        .any(|line| line.trim().starts_with("debug_locks:") && line.trim().ends_with('1'));
    ensure!(on, "lockdep is off:\n{stats}");
    Ok(())
}

/// An object is reported when two scans in a row found nobody who refers to it, and it is older than
/// five seconds (`Documentation/dev-tools/kmemleak.rst`).
fn scan() -> Result<()> {
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(6));
        fs::write(KMEMLEAK, "scan").context("cannot scan with kmemleak")?;
    }
    Ok(())
}

fn nothing_has_leaked(_cx: &Context) -> Result<()> {
    scan()?;
    let leaks = since_the_start(&fs::read_to_string(KMEMLEAK)?);
    ensure!(leaks.is_empty(), "{leaks}");
    Ok(())
}

/// Those that were not made before the first process was there, which `the_checkers_are_at_work` does not
/// see after a machine was started anew.
fn since_the_start(leaks: &str) -> String {
    const HEAD: &str = "unreferenced object";
    let later =
        (leaks.split(HEAD).skip(1)).filter(|object| !object.contains("\"swapper/0\", pid 0,"));
    later.map(|object| format!("{HEAD}{object}")).collect()
}

/// Allocations of one thread that fail (`Documentation/fault-injection/fault-injection.rst`,
/// "fail-nth"). The file is kept open: to open it needs memory too.
struct Failures(File);

impl Failures {
    fn of_this_thread() -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/proc/thread-self/fail-nth");
        Ok(Failures(file.context("no fault injection")?))
    }

    /// Makes the `n`th allocation from here on fail.
    fn arm(&self, n: u32) -> Result<()> {
        let text = n.to_string();
        let written = self.0.write_at(text.as_bytes(), 0);
        written.context("cannot ask for a failure").map(drop)
    }

    /// Whether it has failed. If not, it will not.
    fn disarm(&self) -> Result<bool> {
        let mut text = [0; 16];
        let len = self.0.read_at(&mut text, 0)?;
        self.arm(0)?;
        Ok(text[..len].trim_ascii() == b"0")
    }
}

/// What is tried, and how.
type Operation<'a> = (&'a str, &'a dyn Fn() -> Result<(), Error>);

/// Does something again and again while its first allocation fails, then its second, until it needs no
/// more. It must always end well or with one of the errors that want of memory has; and well when
/// nothing fails. How many allocations failed.
fn fail_each_allocation_of((what, operation): Operation<'_>) -> Result<u32> {
    let failures = Failures::of_this_thread()?;
    for n in 1..1000 {
        failures.arm(n)?;
        let result = operation();
        let injected = failures.disarm()?;
        if let Err(error) = result {
            let code = error.raw_os_error();
            let known = [libc::ENOMEM, libc::ENOBUFS, libc::ENFILE, libc::EMFILE];
            ensure!(
                injected && code.is_some_and(|code| known.contains(&code)),
                "{what}, allocation {n}: {error}"
            );
        }
        if !injected {
            println!("{what}: {} allocations", n - 1);
            return Ok(n - 1);
        }
    }
    bail!("{what}: there is no end of allocations")
}

/// ringbuffer(2): the ring descriptor of one side of a pipe. The kernel's headers of this machine do
/// not know it.
pub(super) fn ring_of(end: &impl AsRawFd, side: u32) -> Result<OwnedFd, Error> {
    const RINGBUFFER: libc::c_long = 473;
    /// `struct ringbuffer_args`: size, side, flags, reserved.
    #[repr(C)]
    struct Args(u64, u32, u32, [u64; 2]);
    let mut args = Args(0, side, 0, [0; 2]);
    let end = end.as_raw_fd();
    // SAFETY: the kernel reads and writes as many bytes of `args` as it is told that there are.
    let fd = unsafe { libc::syscall(RINGBUFFER, end, &raw mut args, size_of::<Args>()) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the call gave a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).map_err(Error::other)?) })
}

fn allocations_that_fail_are_errors_like_others(cx: &Context) -> Result<()> {
    fs::write(format!("{FAILSLAB}/ignore-gfp-wait"), "N").context("cannot set up failslab")?;
    fs::write(format!("{FAILSLAB}/task-filter"), "Y").context("cannot set up failslab")?;
    let server = cx.serve().ublk("yes").arg("disk=mem:4M").start()?;
    let disk = File::options()
        .read(true)
        .write(true)
        .open(server.block_device()?)?;
    let (reader, writer) = std::io::pipe()?;
    let at = |fd: &dyn AsRawFd, name: &str| format!("/dev/self/fd/{}/{name}", fd.as_raw_fd());
    let (read_end, write_end) = (at(&reader, "fresh"), at(&writer, "stream"));
    let (stream_at, datagram_at) = (at(&reader, "stream"), at(&reader, "datagram"));
    let listener = UnixListener::bind(stream_at)?;
    listener.set_nonblocking(true)?;
    let datagrams = UnixDatagram::bind(datagram_at)?;
    datagrams.set_nonblocking(true)?;
    let datagrams_from = at(&writer, "datagram");
    let (at_disk, service) = (at(&disk, "fresh"), at(&disk, "vhost-user-blk"));
    let sender = UnixDatagram::unbound()?;

    let operations: [Operation<'_>; 7] = [
        ("bind at a pipe", &|| {
            UnixListener::bind(&read_end).map(drop)
        }),
        ("bind a datagram socket at a pipe", &|| {
            UnixDatagram::bind(&read_end).map(drop)
        }),
        ("bind at a disk", &|| UnixListener::bind(&at_disk).map(drop)),
        ("connect through a pipe", &|| {
            let client = UnixStream::connect(&write_end)?;
            client.peer_addr()?;
            listener.accept().map(drop)
        }),
        ("send through a pipe", &|| {
            sender.send_to(b"x", &datagrams_from)?;
            datagrams.recv(&mut [0; 4]).map(drop)
        }),
        ("connect to a disk's server", &|| {
            UnixStream::connect(&service).map(drop)
        }),
        ("make a pipe a ring", &|| {
            let (mut reader, mut writer) = std::io::pipe()?;
            writer.write_all(b"before")?;
            let rings = [ring_of(&reader, 0)?, ring_of(&writer, 1)?];
            writer.write_all(b", after")?;
            drop((writer, rings));
            let mut all = String::new();
            reader.read_to_string(&mut all)?;
            if all == "before, after" {
                return Ok(());
            }
            Err(Error::other(format!("{all:?} arrived")))
        }),
    ];
    for operation in operations {
        let count = fail_each_allocation_of(operation)?;
        ensure!(count > 0, "{} needs no memory?", operation.0);
    }
    server.stop()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaks_of_the_start_are_not_ours() {
        let early =
            "unreferenced object 0xff (size 8):\n  comm \"swapper/0\", pid 0, jiffies 4\n    x\n";
        let ours = "unreferenced object 0xfe (size 8):\n  comm \"lab\", pid 9, jiffies 5\n    y\n";
        let report = [early, ours, early].concat();
        assert_eq!(since_the_start(&report), ours);
        assert_eq!(since_the_start(""), "");
    }
}
