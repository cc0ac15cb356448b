//! A machine with its console on the terminal.

use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::termios::{OptionalActions, isatty, tcgetattr, tcsetattr};
use testkit::process;

use super::{Hypervisor, Mode, RunDir, connect, listen};
use crate::channel::FromGuest;
use crate::test::Paths;

/// Boots the machine with a shell, or a command, on the console, and ends with
/// its exit code.
pub fn run(hypervisor: &dyn Hypervisor, repo: &Path, command: Vec<String>) -> Result<ExitCode> {
    let run = RunDir::new()?;
    let mode = Mode::Shell((!command.is_empty()).then_some(command));
    let paths = Paths {
        repo: repo.to_owned(),
        ..Paths::default()
    };
    hypervisor
        .setup(&run, mode.clone())
        .keeping(&paths)
        .write(&run.setup())?;
    let (mut boot, end) = hypervisor.command(&run, &mode)?;

    // Both kinds of machine switch the terminal to raw mode, and leave it so
    // when they are killed.
    let terminal = isatty(rustix::stdio::stdin())
        .then(|| tcgetattr(rustix::stdio::stdin()))
        .transpose()
        .context("cannot read the terminal's modes")?;
    // In our own process group: the machine reads the terminal.
    let mut child = process::spawn_bound(&mut boot)?;
    drop(boot);
    let deadline = Instant::now() + hypervisor.boot_limit();
    let code = connect(end, &mut child, deadline).and_then(|stream| {
        let messages = listen(stream, std::io::sink(), super::Pulse::default());
        loop {
            match messages.recv_timeout(Duration::from_secs(1)) {
                Ok(Ok(FromGuest::Exit { code })) => return Ok(code),
                Ok(Ok(other)) => bail!("unexpected message {other:?}"),
                Ok(Err(error)) => return Err(error),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the machine ended"),
            }
        }
    });
    // The machine ends by itself after the last message; Drop of `run` must
    // wait for that.
    if process::wait_limited(&mut child, Duration::from_secs(10))?.is_none() {
        child.kill().context("cannot kill the machine")?;
    }
    if let Some(modes) = terminal {
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &modes)
            .context("cannot restore the terminal's modes")?;
    }
    Ok(ExitCode::from(u8::try_from(code?).unwrap_or(1)))
}
