//! AF_UNIX addresses in an open file: what the kernel series promises, seen from a program.

use std::fs::File;
use std::io::{Error, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use anyhow::{Context as _, Result, ensure};

use crate::test;
use crate::test::{Context, Test};

/// For every kernel with the series.
pub const TESTS: &[Test] = &[
    test!(a_socket_bound_at_one_end_of_a_pipe_is_found_from_the_other),
    test!(a_socket_bound_at_a_disk_is_found_through_any_open_of_it),
    test!(addresses_that_lead_nowhere_say_why),
];

fn address(fd: RawFd, name: &str) -> String {
    format!("/dev/self/fd/{fd}/{name}")
}

/// The errno that connecting to an address ends with.
fn refusal(address: &str) -> Option<i32> {
    errno(UnixStream::connect(address).map(drop))
}

fn errno(result: Result<(), Error>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// A client at `client` and the server behind `listener` hear each other.
fn talk(listener: &UnixListener, client: &str) -> Result<()> {
    let mut client = UnixStream::connect(client).with_context(|| format!("connect to {client}"))?;
    let (mut server, _) = listener.accept().context("accept")?;
    client.write_all(b"?")?;
    let mut byte = [0];
    server.read_exact(&mut byte)?;
    ensure!(byte == *b"?", "heard {byte:?}");
    Ok(())
}

fn a_socket_bound_at_one_end_of_a_pipe_is_found_from_the_other(_cx: &Context) -> Result<()> {
    let (reader, writer) = std::io::pipe()?;
    let (reading, writing) = (reader.as_raw_fd(), writer.as_raw_fd());
    let listener = UnixListener::bind(address(reading, "ring-buffer")).context("bind")?;
    talk(&listener, &address(writing, "ring-buffer"))?;
    let same_end = refusal(&address(reading, "ring-buffer"));
    ensure!(same_end == Some(libc::ECONNREFUSED));
    let other_name = refusal(&address(writing, "other"));
    ensure!(other_name == Some(libc::ECONNREFUSED));
    let second = errno(UnixListener::bind(address(reading, "ring-buffer")).map(drop));
    ensure!(second == Some(libc::EADDRINUSE));
    // A listener keeps no end open: the reader sees the end of the pipe.
    drop(writer);
    let mut reader = reader;
    ensure!(reader.read(&mut [0; 1])? == 0, "the pipe has no end");
    Ok(())
}

fn a_socket_bound_at_a_disk_is_found_through_any_open_of_it(cx: &Context) -> Result<()> {
    let server = cx.serve().ublk("yes").arg("mem:16M").start()?;
    let disk = server.block_device()?;
    // A process that binds could do what its clients will be able to.
    let read_only = File::open(&disk)?;
    let at = address(read_only.as_raw_fd(), "test");
    let refused = errno(UnixListener::bind(&at).map(drop));
    ensure!(refused == Some(libc::EACCES), "{refused:?}");
    let open = || File::options().read(true).write(true).open(&disk);
    let (bound, other) = (open()?, open()?);
    let listener = UnixListener::bind(address(bound.as_raw_fd(), "test")).context("bind")?;
    talk(&listener, &address(other.as_raw_fd(), "test"))?;
    ensure!(refusal(&at) == Some(libc::EACCES));
    drop((read_only, bound, other));
    server.stop()?;
    Ok(())
}

fn addresses_that_lead_nowhere_say_why(cx: &Context) -> Result<()> {
    let path = cx.scratch().join("file");
    let file = File::create(&path)?;
    let fd = file.as_raw_fd();
    let at_file = errno(UnixListener::bind(address(fd, "x")).map(drop));
    ensure!(at_file == Some(libc::EOPNOTSUPP));
    for (address, expected) in [
        (address(fd, "x"), libc::ECONNREFUSED),
        (address(999, "x"), libc::EBADF),
        ("/dev/self/fd/01/x".into(), libc::EINVAL),
        ("/dev/self/fd/1".into(), libc::EINVAL),
        ("/dev/self/fd/1/a/b".into(), libc::EINVAL),
        ("/dev/self/fd/x/y".into(), libc::ENOENT),
    ] {
        let got = refusal(&address);
        ensure!(got == Some(expected), "{address}: {got:?}, not {expected}");
    }
    Ok(())
}
