//! A runtime directory of its own for each test, and servers in it.

#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything may take here: generous, for slow machines.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A folder with a runtime directory in it.
pub struct Lab {
    temp: tempfile::TempDir,
}

impl Lab {
    /// An empty one.
    pub fn new() -> Self {
        Self {
            temp: tempfile::tempdir().unwrap(),
        }
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    /// An image of zeroes in the folder.
    pub fn image(&self, name: &str, len_bytes: u64) -> PathBuf {
        let path = self.path(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(len_bytes)
            .unwrap();
        path
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ublkup"));
        command
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", self.path("run"))
            .env_remove("UBLKUP_LOG")
            .stdin(Stdio::null());
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.output_with(args, &[])
    }

    /// As [`Lab::output`], with more in the environment.
    pub fn output_with(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut child = self
            .command(args)
            .envs(env.iter().copied())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let status = wait(&mut child, &args.join(" "));
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        child
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut stdout)
            .unwrap();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_end(&mut stderr)
            .unwrap();
        Output {
            status,
            stdout,
            stderr,
        }
    }

    /// Runs a command that must succeed; what it prints.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with `code` and one line that has all of `words`.
    pub fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.output(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        let lines: Vec<_> = stderr
            .lines()
            .filter(|line| line.starts_with("ublkup: "))
            .collect();
        assert_eq!(lines.len(), 1, "{args:?}: {stderr}");
        for word in words {
            assert!(
                lines[0].contains(word),
                "{args:?}: no '{word}' in: {stderr}"
            );
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }

    /// As [`Lab::fails`], for `serve`.
    pub fn serve_fails(&self, args: &[&str], code: i32, words: &[&str]) {
        self.fails(&[&["serve"], args].concat(), code, words);
    }

    /// Starts a server and waits until it is ready.
    pub fn serve(&self, args: &[&str]) -> Server {
        self.serve_with(args, &[])
    }

    /// Starts a server for what was served before, and waits until it is ready.
    pub fn recover(&self, args: &[&str]) -> Server {
        Self::start(self.command(&[&["recover"], args].concat()))
    }

    /// As [`Lab::serve`], with more in the environment.
    pub fn serve_with(&self, args: &[&str], env: &[(&str, &str)]) -> Server {
        let mut command = self.command(&[&["serve"], args].concat());
        command.envs(env.iter().copied());
        Self::start(command)
    }

    /// As [`Lab::serve`], started as nohup(1) does.
    pub fn serve_without_hangups(&self, args: &[&str]) -> Server {
        let server = self.command(&[&["serve"], args].concat());
        let mut command = Command::new("sh");
        command
            .args(["-c", "trap '' HUP; exec \"$0\" \"$@\""])
            .arg(server.get_program())
            .args(server.get_args())
            .env("UBLKUP_RUNTIME_DIR", self.path("run"))
            .stdin(Stdio::null());
        Self::start(command)
    }

    /// Starts the server that a command runs, and waits until it is ready.
    pub fn start(mut command: Command) -> Server {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = child.stdout.take().unwrap();
        let (lines, seen) = mpsc::channel();
        // A thread, because a read has no time limit; it ends with the server.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        let mut server = Server { child };
        loop {
            match seen.recv_timeout(LIMIT) {
                Ok(line) if line == "ready" => return server,
                Ok(_) => {}
                Err(_) => {
                    let _ = server.child.kill();
                    panic!("{command:?} is not ready: {}", server.log());
                }
            }
        }
    }

    /// Whether no export has left anything.
    pub fn is_empty(&self) -> bool {
        std::fs::read_dir(self.path("run/exports"))
            .map_or(true, |mut entries| entries.next().is_none())
    }

    /// Asserts that no export has left anything.
    pub fn is_clean(&self) {
        assert!(
            self.is_empty(),
            "left behind: {:?}",
            tree(&self.path("run"))
        );
    }
}

fn tree(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return vec![path.to_owned()];
    };
    entries
        .flatten()
        .flat_map(|entry| tree(&entry.path()))
        .collect()
}

/// A server that runs; killed when dropped.
pub struct Server {
    child: Child,
}

impl Server {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Stops it as a service manager would; it must end well. What it logged.
    pub fn stop(self) -> String {
        let (code, log) = self.end();
        assert_eq!(code, Some(0), "{log}");
        log
    }

    /// Stops it as a service manager would: exit code and log.
    pub fn end(self) -> (Option<i32>, String) {
        self.end_by(Signal::TERM)
    }

    /// Ends it with a signal: exit code and log.
    pub fn end_by(mut self, signal: Signal) -> (Option<i32>, String) {
        self.signal(signal);
        let status = wait(&mut self.child, "the server");
        (status.code(), self.log())
    }

    /// Waits for it to end by itself.
    pub fn wait(mut self) -> Option<i32> {
        wait(&mut self.child, "the server").code()
    }

    /// Kills it with SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    fn log(&mut self) -> String {
        let mut log = String::new();
        self.child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        log
    }

    /// Whether it would notice SIGHUP.
    pub fn hears_hangups(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let caught = status
            .lines()
            .find_map(|line| line.strip_prefix("SigCgt:"))
            .unwrap();
        // SIGHUP is 1, the lowest bit.
        u64::from_str_radix(caught.trim(), 16).unwrap() & 1 == 1
    }

    /// Context switches of all its threads so far, of their own will or not.
    pub fn switches(&self) -> u64 {
        let of = |task: std::io::Result<std::fs::DirEntry>| {
            let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            field(&status, "voluntary_ctxt_switches:")
                + field(&status, "nonvoluntary_ctxt_switches:")
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid()));
        tasks.unwrap().map(of).sum()
    }

    /// Waits until all threads have lain down, then asserts that none is scheduled for the time
    /// that something periodic would need to show itself.
    pub fn is_idle(&self, when: &str) {
        let mut before = self.switches();
        let settled = (0..100).any(|_| {
            std::thread::sleep(Duration::from_millis(200));
            std::mem::replace(&mut before, self.switches()) == before
        });
        assert!(settled && before > 0, "{when}, the server never sleeps");
        std::thread::sleep(Duration::from_secs(10));
        assert_eq!(self.switches(), before, "{when}, an idle server woke up");
    }

    /// Resident memory.
    pub fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        field(&status, "VmRSS:")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn field(status: &str, name: &str) -> u64 {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len()..]
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

fn wait(child: &mut Child, what: &str) -> std::process::ExitStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{what} does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
