//! The sandbox: what a server that a guest has taken over can still reach.
//!
//! A server needs little once its exports are open, because it keeps what it has opened. So it gives up the rest then:
//!
//! | file           | what takes it away                                                     |
//! |----------------|------------------------------------------------------------------------|
//! | `mounts.rs`    | a mount namespace with what is needed                                  |
//! | `files.rs`     | Landlock: files, TCP, abstract sockets and processes of others         |
//! | `seccomp.rs`   | a filter of system calls: programs, other processes, sockets, mounts … |
//! | `threads.rs`   | what the kernel keeps for each thread, taken away on all of them       |
//! | `io::ThreadRestrictions` | operations of io_uring, which goes around the filter         |
//!
//! Nothing can be got back. All threads get the same: threads of one process share its memory and are no boundary for
//! each other. What a kernel or a container does not let us take away stays, and is [told](Status).

mod files;
mod mounts;
mod seccomp;
mod threads;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use files::Files;
pub use files::{Access, Reach, Servers};
use mounts::Namespace;
use threads::{Change, Confinement, Lack};

use crate::engine::wait::repeat_while;
use crate::io::{ThreadRestrictions, are_rings_restricted, leave_rings_unrestricted};

/// For how long the kernel's workers are waited for at the longest, and how often it is looked.
const WORKERS_LIMIT: Duration = Duration::from_secs(1);
const WORKERS_INTERVAL: Duration = Duration::from_millis(5);

static STATUS: OnceLock<Status> = OnceLock::new();

/// How this process is confined.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// Whether it was to be.
    pub on: bool,
    /// What could not be taken away, and what would.
    pub missing: Vec<String>,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.on, &self.missing[..]) {
            (false, _) => f.write_str("off"),
            (true, []) => f.write_str("on"),
            (true, missing) => write!(f, "on, but {}", missing.join("; ")),
        }
    }
}

/// How this process is confined; not at all before [`enter`].
#[must_use]
pub fn status() -> Status {
    STATUS.get().cloned().unwrap_or_default()
}

/// Nothing will be taken away. Before the first ring is made.
pub fn stay_outside() {
    leave_rings_unrestricted();
}

/// Moves all threads of this process to a mount namespace of their own, which has the mounts of `reach`. Before [`enter`],
/// and also where that is not wanted: it is for the server's own end, see `mounts.rs`.
///
/// # Errors
///
/// Why there is none, or which threads are not in it.
pub fn leave_mounts(reach: &Reach) -> io::Result<()> {
    let needed: Vec<PathBuf> = reach.paths.iter().map(|(path, _)| path.clone()).collect();
    let lacks = threads::change_all(Change::Namespace(Namespace::new(&needed)?))?;
    // Workers of the kernel end by themselves when they have nothing to do.
    let elsewhere = repeat_while(
        WORKERS_LIMIT,
        WORKERS_INTERVAL,
        mounts::threads_elsewhere,
        |elsewhere| !elsewhere.as_ref().is_ok_and(Vec::is_empty),
    )?;
    match lacks.contains(Lack::Namespace) {
        false if elsewhere.is_empty() => Ok(()),
        _ => Err(io::Error::other(format!(
            "threads stay outside: {}",
            elsewhere.join(", ")
        ))),
    }
}

/// Whether [`leave_mounts`] can be done here.
///
/// # Errors
///
/// Why not.
pub fn probe_mounts() -> io::Result<()> {
    Namespace::new(&["/proc".into()]).map(drop)
}

/// Takes away from all threads of this process, and from those that they will start, what is beyond `reach`.
pub fn enter(reach: &Reach) -> Status {
    confine(reach, true)
}

/// What [`enter`] would take away here, tried on a thread that ends then.
#[must_use]
pub fn probe() -> Status {
    let tried = std::thread::Builder::new().spawn(|| confine(&Reach::default(), false));
    match tried.map(std::thread::JoinHandle::join) {
        Ok(Ok(status)) => status,
        _ => Status {
            on: true,
            missing: vec!["everything: no thread could be started to try it".into()],
        },
    }
}

fn confine(reach: &Reach, all_threads: bool) -> Status {
    let mut missing = Vec::new();
    let files = Files::new(reach);
    if let Err(error) = &files {
        missing.push(format!("files stay open to it: {error}"));
    }
    missing.extend(files::lacks(reach));
    let confinement = Confinement {
        files: files.ok(),
        rings: ThreadRestrictions::default(),
        capabilities: reach.capabilities(),
    };
    let lacks = match all_threads {
        true => threads::change_all(Change::Confinement(confinement.into())),
        false => Ok(confinement.apply()),
    };
    match lacks {
        Ok(lacks) => {
            if lacks.contains(Lack::Files) {
                missing.push("files stay open to it: Landlock was refused".into());
            }
            if lacks.contains(Lack::Capabilities) {
                missing.push("it keeps its capabilities: capset(2) was refused".into());
            }
            if !are_rings_restricted() {
                missing.push("its rings take all operations (Linux 5.19)".into());
            }
            if lacks.contains(Lack::Rings) {
                missing.push(
                    "rings that it makes beside those of the server take all operations, like connecting sockets \
                     (Linux 7.0)"
                        .into(),
                );
            }
        }
        Err(error) => missing.push(format!("threads that ran before are as they were: {error}")),
    }
    if let Err(error) = seccomp::confine(all_threads, reach.servers) {
        missing.push(format!("all system calls stay open to it: {error}"));
    }
    let status = Status { on: true, missing };
    if all_threads {
        // A process enters once.
        let _ = STATUS.set(status.clone());
    }
    status
}
