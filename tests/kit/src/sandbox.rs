//! A directory with a runtime directory of its own, and commands of ublkup in it. The methods panic
//! when something is not as it should be.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::server::Server;
use crate::shell::{Finished, Shell};

/// How long anything may take here: generous, for slow machines.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The directory. It is removed with the value.
#[derive(Debug)]
pub struct Sandbox {
    temp: tempfile::TempDir,
    program: PathBuf,
}

impl Sandbox {
    /// An empty one for this program.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            temp: tempfile::tempdir().unwrap(),
            program: program.into(),
        }
    }

    /// A path in the directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// An image of zeroes in the directory.
    #[must_use]
    pub fn image(&self, name: &str, len_bytes: u64) -> PathBuf {
        let path = self.path(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(len_bytes).unwrap();
        path
    }

    /// Runs a command to its end.
    #[must_use]
    pub fn finish(&self, args: &[&str], env: &[(&str, &str)]) -> Finished {
        let mut shell = Shell::new(&self.program)
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", self.path("run"))
            .env_remove("UBLKUP_LOG")
            .limit(LIMIT);
        for (name, value) in env {
            shell = shell.env(name, value);
        }
        shell.finish().unwrap()
    }

    /// Runs a command that must succeed; its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let finished = self.finish(args, &[]);
        assert!(finished.status.success(), "{args:?}: {finished:?}");
        finished.stdout
    }

    /// Runs a command that must fail with `code` and one line that has all of `words`.
    pub fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let Finished { status, stderr, .. } = self.finish(args, &[]);
        assert_eq!(status.code(), Some(code), "{args:?}: {stderr}");
        let lines = stderr.lines().filter(|line| line.starts_with("ublkup: "));
        let lines: Vec<_> = lines.collect();
        assert_eq!(lines.len(), 1, "{args:?}: {stderr}");
        for word in words {
            assert!(
                lines[0].contains(word),
                "{args:?}: no '{word}' in: {stderr}"
            );
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }

    /// As [`Self::fails`], for `serve`.
    pub fn serve_fails(&self, args: &[&str], code: i32, words: &[&str]) {
        self.fails(&[&["serve"], args].concat(), code, words);
    }

    /// Starts a server and waits until it is ready.
    #[must_use]
    pub fn serve(&self, args: &[&str]) -> Server {
        self.serve_with(args, &[])
    }

    /// Starts a server for what was served before, and waits until it is ready.
    #[must_use]
    pub fn recover(&self, args: &[&str]) -> Server {
        start(self.command(&[&["recover"], args].concat()))
    }

    /// As [`Self::serve`], with more in the environment.
    #[must_use]
    pub fn serve_with(&self, args: &[&str], env: &[(&str, &str)]) -> Server {
        let mut command = self.command(&[&["serve"], args].concat());
        command.envs(env.iter().copied());
        start(command)
    }

    /// As [`Self::serve`], started as nohup(1) does.
    #[must_use]
    pub fn serve_without_hangups(&self, args: &[&str]) -> Server {
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
            .arg(&self.program)
            .arg("serve")
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", self.path("run"))
            .stdin(Stdio::null());
        start(command)
    }

    /// A command that is yet to be run.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", self.path("run"))
            .env_remove("UBLKUP_LOG")
            .stdin(Stdio::null());
        command
    }

    /// Connects to the vhost-user-blk socket of an export.
    #[must_use]
    pub fn connect(&self, export: &str) -> UnixStream {
        let socket = self.path(&format!("run/exports/{export}/vhost-user-blk"));
        UnixStream::connect(socket).unwrap()
    }

    /// Whether no export has left anything.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        std::fs::read_dir(self.path("run/exports"))
            .map_or(true, |mut entries| entries.next().is_none())
    }

    /// Asserts that no export has left anything.
    pub fn is_clean(&self) {
        let left = tree(&self.path("run"));
        assert!(self.is_empty(), "left behind: {left:?}");
    }
}

/// Starts the server that a command runs, and waits until it is ready.
#[must_use]
pub fn start(mut command: Command) -> Server {
    let server = Server::launch(&mut command, LIMIT).unwrap();
    server.ready().unwrap()
}

fn tree(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return vec![path.to_owned()];
    };
    let entries = entries.flatten();
    entries.flat_map(|entry| tree(&entry.path())).collect()
}
