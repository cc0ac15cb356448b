//! The servers that are compared, one process per connection.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Result;
use testkit::proc;
use testkit::server::{Serve, Server};
use testkit::shell::Shell;

/// What is behind the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Nothing.
    Null,
    /// Memory; QEMU's daemon has none and shows its null disk instead.
    Mem,
    /// A file on the disk's file system, without its page cache.
    Direct,
    /// A file in memory, through the page cache.
    Tmpfs,
}

impl Backend {
    /// All of them.
    pub const ALL: [Backend; 4] = [Backend::Null, Backend::Mem, Backend::Direct, Backend::Tmpfs];

    /// Its word in tables.
    pub fn name(self) -> &'static str {
        match self {
            Backend::Null => "null",
            Backend::Mem => "mem",
            Backend::Direct => "file, O_DIRECT",
            Backend::Tmpfs => "file, tmpfs",
        }
    }
}

/// How big every disk is.
pub const DISK_BYTES: u64 = 1 << 30;

/// The files behind the disks.
#[derive(Debug)]
pub struct Files {
    /// Where sockets and logs go.
    pub scratch: PathBuf,
    /// On a file system that knows O_DIRECT.
    pub direct: PathBuf,
    /// On tmpfs.
    pub tmpfs: PathBuf,
}

/// Who serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// ublkup, with flags of `serve`.
    Ublkup {
        /// The name in tables.
        name: String,
        /// The program.
        binary: PathBuf,
        /// The flags.
        flags: &'static [&'static str],
    },
    /// qemu-storage-daemon.
    Qemu,
}

impl Who {
    /// Ours, told nothing.
    pub fn is_plain(&self) -> bool {
        matches!(self, Self::Ublkup { flags: [], .. })
    }

    /// Its name in tables.
    pub fn name(&self) -> &str {
        match self {
            Who::Ublkup { name, .. } => name,
            Who::Qemu => "qemu-storage-daemon",
        }
    }
}

/// Whether a ublkup knows a flag of `serve`.
pub fn knows(binary: &Path, flag: &str) -> bool {
    let help = Shell::new(binary).args(["serve", "--help"]).run();
    help.is_ok_and(|text| text.contains(flag))
}

/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(20);

/// Starts a server on one processor.
pub fn start(
    who: &Who,
    backend: Backend,
    files: &Files,
    socket: &Path,
    cpu: usize,
) -> Result<Server> {
    // A socket that is left over would look like one that listens.
    let _none = std::fs::remove_file(socket);
    let mut words: Vec<OsString> = vec!["taskset".into(), "-c".into(), cpu.to_string().into()];
    match who {
        Who::Ublkup { binary, flags, .. } => {
            let serve = Serve::new(binary, PATIENCE)
                .under(words)
                .env("UBLKUP_RUNTIME_DIR", files.scratch.join("run"))
                .ublk("no")
                .name("bench")
                .vhost_socket(socket)
                .args(["--queues", "1"])
                .args(*flags);
            serve.arg(spec(backend, files)).start()
        }
        Who::Qemu => {
            words.push("qemu-storage-daemon".into());
            let node = match backend {
                Backend::Null | Backend::Mem => {
                    format!("driver=null-co,node-name=n0,size={DISK_BYTES},read-zeroes=off")
                }
                Backend::Direct => format!(
                    "driver=file,node-name=n0,filename={},aio=io_uring,cache.direct=on",
                    files.direct.display()
                ),
                Backend::Tmpfs => format!(
                    "driver=file,node-name=n0,filename={},aio=io_uring,cache.direct=off",
                    files.tmpfs.display()
                ),
            };
            let export = format!(
                "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,\
                 num-queues=1,iothread=io0",
                socket.display()
            );
            for word in ["--blockdev", &node, "--object", "iothread,id=io0"] {
                words.push(word.into());
            }
            for word in ["--export", &export] {
                words.push(word.into());
            }
            let mut command = Command::new(&words[0]);
            command.args(&words[1..]);
            testkit::process::bind(&mut command);
            let server = Server::launch(command.stdin(Stdio::null()), PATIENCE)?;
            server.ready_when(|_| proc::is_listened_on(socket))
        }
    }
}

fn spec(backend: Backend, files: &Files) -> String {
    match backend {
        Backend::Null => format!("null:{DISK_BYTES}"),
        Backend::Mem => format!("mem:{DISK_BYTES}"),
        Backend::Direct => format!("file:{},cache=direct", files.direct.display()),
        Backend::Tmpfs => format!("file:{},cache=buffered", files.tmpfs.display()),
    }
}
