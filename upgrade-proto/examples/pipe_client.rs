//! The reader of a pipe that asks for more than the pipe: `pipe_server | pipe_client`.

use std::error::Error;
use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use upgrade_proto::{Answer, Lookup, Name, connect};

fn main() -> Result<(), Box<dyn Error>> {
    let mut lookup = Lookup::default();
    if let Some(dir) = std::env::args_os().nth(1) {
        lookup.runtime_dirs = vec![dir.into()];
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    println!("client: the pipe says '{}'", line.trim_end());

    let connection = match connect(std::io::stdin(), &Name::new("ring-buffer")?, &lookup)? {
        Answer::Found(connection) => connection,
        Answer::NoService(why) => {
            println!("client: staying with the pipe: {why}");
            return Ok(());
        }
    };
    connection
        .stream()
        .set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut greeting = [0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        &connection,
        &mut [IoSliceMut::new(&mut greeting)],
        &mut rights,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let memory = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let memory = File::from(memory.ok_or("the server sent no memory")?);
    let mut seen = [0; 21];
    memory.read_exact_at(&mut seen, 0)?;
    memory.write_all_at(b"written by the client", 2048)?;
    connection.stream().write_all(b"hello from the client")?;
    let greeting = String::from_utf8_lossy(&greeting[..received.bytes]);
    println!(
        "client: way {:?}, '{greeting}', memory says '{}'",
        connection.way(),
        String::from_utf8_lossy(&seen)
    );
    Ok(())
}
