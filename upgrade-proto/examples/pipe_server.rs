//! The writer of a pipe that offers more than the pipe: `pipe_server | pipe_client`.
//!
//! A reader that knows nothing reads one line. One that asks for `ring-buffer` gets a memfd, the place
//! for a ring, and a greeting. An argument names another runtime directory than the usual one.

use std::error::Error;
use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use upgrade_proto::{Listener, Name, Options};

const PATIENCE_S: i64 = 20;

fn main() -> Result<(), Box<dyn Error>> {
    let mut options = Options::default();
    if let Some(dir) = std::env::args_os().nth(1) {
        options.runtime_dir = Some(dir.into());
    }
    let mut pipe = std::io::stdout();
    let listener = Listener::bind(&pipe, &Name::new("ring-buffer")?, &options)?;
    // The line tells a reader that the offer stands.
    writeln!(pipe, "one line for those who only read")?;
    pipe.flush()?;

    let patience = Timespec {
        tv_sec: PATIENCE_S,
        tv_nsec: 0,
    };
    if poll(
        &mut [PollFd::new(&listener, PollFlags::IN)],
        Some(&patience),
    )? == 0
    {
        eprintln!("server: nobody asked for the ring");
        return Ok(());
    }
    let Some(connection) = listener.accept()? else {
        return Err("the client left before it was accepted".into());
    };
    let memory = File::from(memfd_create("ring-buffer", MemfdFlags::CLOEXEC)?);
    memory.set_len(4096)?;
    memory.write_all_at(b"written by the server", 0)?;

    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let memory_fd = [memory.as_fd()];
    if !rights.push(SendAncillaryMessage::ScmRights(&memory_fd)) {
        return Err("no room for one descriptor".into());
    }
    sendmsg(
        &connection,
        &[IoSlice::new(b"hello from the server")],
        &mut rights,
        SendFlags::NOSIGNAL,
    )?;

    let mut stream = connection.stream();
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut greeting = String::new();
    stream.read_to_string(&mut greeting)?;
    let mut seen = [0; 21];
    memory.read_exact_at(&mut seen, 2048)?;
    eprintln!(
        "server: way {:?}, '{greeting}', memory says '{}'",
        connection.way(),
        String::from_utf8_lossy(&seen)
    );
    Ok(())
}
