//! User Mode Linux: a kernel that is a process.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::{ChannelEnd, Hypervisor, Mode, Mount, RunDir, SETUP_VARIABLE, Setup};
use crate::test::Place;

/// A User Mode Linux machine.
#[derive(Clone, Debug)]
pub struct Uml {
    kernel: PathBuf,
    memory_mib: u32,
    arguments: Vec<String>,
}

impl Uml {
    /// One processor, 2 GiB, no disks.
    pub fn new(kernel: &Path) -> Self {
        Uml {
            kernel: kernel.to_owned(),
            memory_mib: 2048,
            arguments: Vec::new(),
        }
    }

    /// The guest's memory.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a vhost-user-blk disk, without any emulation: the kernel itself is
    /// the client. The first is `/dev/vda`.
    pub fn vhost_disk(self, socket: &Path) -> Self {
        // 2 is virtio's number of the block device.
        self.argument(format!("virtio_uml.device={}:2", socket.display()))
    }

    /// One more word for the kernel's command line, such as `ubd0=FILE`.
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }
}

impl Hypervisor for Uml {
    fn name(&self) -> &'static str {
        "uml"
    }

    fn place(&self) -> Place {
        Place::Uml
    }

    fn boot_limit(&self) -> Duration {
        Duration::from_secs(60)
    }

    fn setup(&self, run: &RunDir, mode: Mode) -> Setup {
        Setup {
            place: Place::Uml,
            mode,
            exchange: Mount {
                kind: "hostfs".into(),
                source: "none".into(),
                options: run.exchange().display().to_string(),
            },
            channel: "/dev/ttyS1".into(),
            powers_off: true,
            keep: Vec::new(),
        }
    }

    fn command(&self, run: &RunDir, mode: &Mode) -> Result<(Command, ChannelEnd)> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a channel")?;
        let mut command = Command::new(&self.kernel);
        command
            .arg(format!("mem={}M", self.memory_mib))
            .args(["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"])
            // Half the time per system call of the default mode. More than one
            // processor boots, but its timers stall.
            .args(["seccomp=on", "ncpus=1", "con=null", "ssl=null"])
            .arg("printk.devkmsg=on")
            .arg(format!("uml_dir={}/", run.dir().display()))
            .arg(format!("init={}", run.init().display()))
            .arg(format!("{SETUP_VARIABLE}={}", run.setup().display()))
            .args(&self.arguments);
        let theirs = OwnedFd::from(theirs);
        match mode {
            Mode::Agent => {
                // Standard input and output are the channel, standard error is
                // the console.
                let output = theirs.try_clone().context("cannot share the channel")?;
                command
                    .args(["con0=null,fd:2", "ssl1=fd:0,fd:1"])
                    .stdin(Stdio::from(theirs))
                    .stdout(Stdio::from(output));
            }
            Mode::Shell(_) => {
                command
                    .arg("quiet")
                    .args(["con0=fd:0,fd:1", "ssl1=null,fd:2"])
                    .stdin(Stdio::inherit())
                    .stdout(Stdio::inherit())
                    .stderr(Stdio::from(theirs));
            }
        }
        command.env("TMPDIR", memory_dir(self.memory_mib, run));
        Ok((command, ChannelEnd::Connected(ours)))
    }
}

/// The guest's memory is a sparse file: `/dev/shm` is the best place for it, if
/// we may write there and it is large enough (in containers it often is not).
fn memory_dir(memory_mib: u32, run: &RunDir) -> PathBuf {
    let shared = Path::new("/dev/shm");
    let wanted_bytes = u64::from(memory_mib) * 2 * 1024 * 1024;
    let roomy = rustix::fs::statvfs(shared)
        .is_ok_and(|facts| facts.f_bavail.saturating_mul(facts.f_frsize) > wanted_bytes);
    let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    if roomy && rustix::fs::access(shared, access).is_ok() {
        shared.to_owned()
    } else {
        run.dir().to_owned()
    }
}
