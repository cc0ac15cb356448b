//! `ublkup serve --run`: a program for as long as which the exports are served.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};

use crate::export::runtime_dir::RuntimeDir;
use crate::export::{Door, Event, Export};

/// A program that was started. If this server ends before it, it gets SIGTERM.
pub(super) struct Program(Arc<OnceLock<ExitStatus>>);

impl Program {
    /// Starts a shell command. It has to be before this process gives up what programs need.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub(super) fn start(
        command: &OsStr,
        dir: &RuntimeDir,
        exports: &BTreeMap<String, Export>,
        events: &mpsc::Sender<Event>,
    ) -> Result<Self> {
        let mut shell = Command::new("/bin/sh");
        shell
            .arg("-c")
            .arg(command)
            .env("UBLKUP_RUNTIME_DIR", dir.path());
        let mut all = exports.values();
        if let (Some(only), None) = (all.next(), all.next()) {
            for (door, path) in only.doors() {
                let variable = match door {
                    Door::Ublk => "UBLKUP_DEVICE",
                    Door::Vhost => "UBLKUP_SOCKET",
                };
                shell.env(variable, path);
            }
        }
        let status = Arc::new(OnceLock::new());
        let (ended, told) = (Arc::clone(&status), events.clone());
        let cannot_start = "cannot start the shell for --run (/bin/sh)";
        let child = shell.spawn().context(cannot_start)?;
        let guard = Command::new("/bin/sh")
            .args(["-c", GUARD, &child.id().to_string()])
            .stdin(Stdio::piped())
            .spawn()
            .context(cannot_start)?;
        let wait = move || {
            wait(child, guard, &ended);
            // Without a receiver the server is ending anyway.
            let _ = told.send(Event::ProgramEnded);
        };
        let thread = std::thread::Builder::new().name("program".into());
        thread
            .spawn(wait)
            .context("cannot start the thread that waits for the program of --run")?;
        Ok(Self(status))
    }

    /// Its exit code, or 128 and the signal that ended it, as a shell has it; `None` while it runs.
    pub(super) fn code(&self) -> Option<ExitCode> {
        let status = self.0.get()?;
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        let code = code.and_then(|code| u8::try_from(code).ok());
        Some(code.map_or(ExitCode::FAILURE, ExitCode::from))
    }
}

/// Ends the program when this server has ended before it. A server in its sandbox cannot signal other
/// processes, nor does the kernel at the death of a parent.
const GUARD: &str = "read -r ended || kill $0";

fn wait(mut child: Child, mut guard: Child, ended: &OnceLock<ExitStatus>) {
    match child.wait() {
        Ok(status) => _ = ended.set(status),
        Err(error) => tracing::error!(%error, "cannot wait for the program of --run"),
    }
    if let Some(mut told) = guard.stdin.take() {
        // Another process may have ended it.
        let _ = told.write_all(b"\n");
    }
    let _ = guard.wait();
}
