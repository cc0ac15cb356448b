//! Everything that QEMU reads: a `qemu-storage-daemon` per export, which this program starts, watches and starts again, and
//! whose disk is the storage `vhost-user`.
//!
//! | file          | tells                                                                  |
//! |---------------|------------------------------------------------------------------------|
//! | `disk.rs`     | what the daemon is to open, and its command line                       |
//! | `format.rs`   | images that are refused because their format would be guessed          |
//! | `keeper.rs`   | the process that starts the daemon, and ends it when the server is gone |
//! | `messages.rs` | what that process and the server say to each other                     |
//! | `snapshot.rs` | the steps of a snapshot                                                |

mod disk;
mod format;
mod keeper;
mod messages;
mod snapshot;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

pub use disk::{HELD_LIMIT, Locked, NEW_IMAGE, QemuDisk, image_of, lock_image};
pub use keeper::keep;

use super::vhost_user::{VhostUser, VhostUserError, VhostUserOptions, VhostUserQueue};
use crate::engine::wait::repeat_while;
use crate::engine::{Changed, Sharing, SnapshotProgress, SnapshotStep, Storage, StorageControl};
use crate::io::Ring;
use crate::request::{Limits, format_size};
use keeper::{DISK, Keeper, PROGRAM};
use messages::{Answer, Order, Told};

/// How long the daemon may take to open the image, with what an earlier one takes to end.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to do what it is asked for. It limits its steps itself.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take until a daemon that was started again has the requests.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const CONNECT_INTERVAL: Duration = Duration::from_millis(2);

/// Virtqueues at most, as many as the storage uses.
const MAX_QUEUES: u16 = super::vhost_user::MAX_QUEUES;

/// Why a disk cannot be served. Each names it and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// There is no daemon, or it does not serve the disk.
    #[error("{disk}: {why}")]
    Daemon {
        /// The disk.
        disk: String,
        /// What is wrong, and what to do.
        why: String,
    },
    /// The daemon's disk cannot be used.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
}

/// A disk that a `qemu-storage-daemon` has.
pub struct Qemu {
    name: String,
    vhost: VhostUser,
    /// With the answers to orders.
    keeper: Mutex<(Keeper, Receiver<Answer>)>,
}

impl Qemu {
    /// The socket of the daemon's disk, in the folder of an export.
    #[must_use]
    pub fn socket(folder: &Path) -> PathBuf {
        folder.join(DISK)
    }

    /// Starts a daemon and connects to it. What it needs besides its [disk](Self::socket) is in the same folder.
    ///
    /// # Errors
    ///
    /// One line that names the disk, what is wrong and what to do.
    pub fn open(
        disk: &QemuDisk,
        folder: &Path,
        options: &VhostUserOptions,
    ) -> Result<Self, QemuError> {
        let name = disk.to_string();
        let failed = |why: String| QemuError::Daemon {
            disk: name.clone(),
            why,
        };
        Self::check_installed().map_err(failed)?;
        let arguments = disk.arguments(
            &options.socket,
            (options.queues.clamp(1, MAX_QUEUES), options.read_only),
        );
        let cannot_start = |error: io::Error| failed(format!("cannot start its keeper: {error}"));
        let keeper = Keeper::start(folder, &arguments).map_err(cannot_start)?;
        let all = keeper.told().map_err(cannot_start)?;
        let is_stopped = keeper.is_stopped();
        let (first, told) = mpsc::channel();
        let (answers, answered) = mpsc::channel();
        let export = options.export.clone();
        let watch = move || {
            for one in all {
                match one {
                    Told::Answer(answer) => drop(answers.send(answer)),
                    one => {
                        if let Err(mpsc::SendError(Told::Ended(why))) = first.send(one) {
                            tracing::error!(
                                export,
                                "{why}; it is started again, and requests wait until then"
                            );
                        }
                    }
                }
            }
            if !is_stopped() {
                tracing::error!(
                    export,
                    "the process that starts {PROGRAM} has ended: requests wait until this server is started again"
                );
            }
        };
        let thread = thread::Builder::new().name("qemu-daemon".into());
        thread.spawn(watch).map_err(cannot_start)?;
        match told.recv_timeout(START_LIMIT) {
            Ok(Told::Ended(why)) => {
                return Err(failed(with_hint(without_option(why, &arguments))));
            }
            Ok(_) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return Err(failed("the process that starts it ended".into()));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(failed(format!("{PROGRAM} does not open it")));
            }
        }
        let vhost = VhostUser::open(options).map_err(|error| {
            // The daemon's own words are better.
            match told.try_iter().find_map(Told::end) {
                Some(why) => failed(with_hint(without_option(why, &arguments))),
                None => error.into(),
            }
        })?;
        drop(told);
        Ok(Self {
            name,
            vhost,
            keeper: Mutex::new((keeper, answered)),
        })
    }

    /// Whether there is a daemon to be started.
    ///
    /// # Errors
    ///
    /// How to get it.
    pub fn check_installed() -> Result<PathBuf, String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path)
            .map(|folder| folder.join(PROGRAM))
            .find(|program| program.is_file());
        found.ok_or_else(|| {
            format!("{PROGRAM} is not installed: Debian and Ubuntu have it in qemu-utils or qemu-system-common, Fedora in qemu-img")
        })
    }

    fn keeper(&self) -> MutexGuard<'_, (Keeper, Receiver<Answer>)> {
        // Both are whole after any panic.
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the keeper do something.
    fn ask(&self, order: Order) -> io::Result<SnapshotProgress> {
        let keeper = self.keeper();
        // Of one that was not waited for.
        keeper.1.try_iter().for_each(drop);
        keeper.0.ask(order)?;
        let answer = keeper.1.recv_timeout(ANSWER_LIMIT);
        let answer = answer.unwrap_or_else(|_| Err(format!("{PROGRAM} does not answer")));
        answer.map_err(|why| io::Error::other(format!("{}: {why}", self.name)))
    }
}

/// What the daemon said, without the option that it says it of.
fn without_option(why: String, arguments: &[OsString]) -> String {
    let pairs = arguments.windows(2);
    pairs.fold(why, |why, pair| {
        let [option, value] = [&pair[0], &pair[1]].map(|part| part.to_string_lossy());
        why.replace(&format!("{option} {value}: "), "")
    })
}

/// What the daemon said, with what to do.
fn with_hint(why: String) -> String {
    let has = |text: &str| why.contains(text);
    let hint = if has("Failed to get") && has("lock") {
        "; another process has the image open: end it first"
    } else if has("No such file") {
        "; make the image first (qemu-img create), or correct the path"
    } else if has("is not in") {
        "; see what it is: qemu-img info"
    } else if has("key-secret") || has("encrypt.format") {
        "; it is encrypted: give its key by a file: encrypt.format=luks,encrypt.key-secret=k,secret.k=FILE (driver luks: key-secret=k,secret.k=FILE)"
    } else if has("O_DIRECT") {
        "; its file system has no direct I/O: give file.cache.direct=off,file.aio=threads"
    } else {
        ""
    };
    format!("{why}{hint}")
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
    }
}

impl StorageControl for Qemu {
    fn limits(&self) -> &Limits {
        self.vhost.limits()
    }

    fn identity(&self) -> Option<String> {
        Some(self.name.clone())
    }

    fn last_error(&self) -> Option<String> {
        self.vhost.last_error()
    }

    fn sharing(&self) -> Option<Arc<dyn Sharing>> {
        self.vhost.sharing()
    }

    fn waits_for(&self) -> Option<String> {
        self.vhost.waits_for()
    }

    fn on_change(&self, tell: Changed) {
        self.vhost.on_change(tell);
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        let Some(wanted) = wanted_bytes else {
            return self.vhost.grow(None);
        };
        let now = self.limits().capacity.bytes();
        if wanted < now {
            return Err(io::Error::other(format!(
                "{} has {} and does not shrink",
                self.name,
                format_size(now)
            )));
        }
        if wanted > now {
            self.ask(Order::Resize(wanted))?;
        }
        self.vhost.grow(Some(wanted))
    }

    fn snapshot(&self, step: SnapshotStep) -> io::Result<SnapshotProgress> {
        let ends = matches!(step, SnapshotStep::Begin | SnapshotStep::Finish);
        let failed = |why: String| io::Error::other(format!("{}: {why}", self.name));
        // That of a snapshot before ends with a connection.
        let begin = || self.vhost.pause();
        if ends && !repeat_while(CONNECT_LIMIT, CONNECT_INTERVAL, begin, |is_new| !is_new) {
            return Err(failed("requests wait for a snapshot already".into()));
        }
        let done = self.ask(Order::Snapshot(step));
        if ends {
            self.vhost.settle(done.is_ok());
        }
        let done = done?;
        if step == SnapshotStep::Resume && done.failed.is_none() {
            let waits = || self.vhost.is_paused();
            if repeat_while(CONNECT_LIMIT, CONNECT_INTERVAL, waits, |waits| *waits) {
                let why = self.vhost.waits_for().unwrap_or_default();
                return Err(failed(format!("requests wait: {why}")));
            }
        }
        Ok(done)
    }

    fn end(&self) {
        self.vhost.end();
        self.keeper().0.stop();
    }

    fn cut(&self, _: u64) -> io::Result<()> {
        Err(io::Error::other(format!("{} does not shrink", self.name)))
    }
}

impl Storage for Qemu {
    type Queue = VhostUserQueue;

    const RING_OPERATIONS: u32 = VhostUser::RING_OPERATIONS;

    fn limits_mut(&mut self) -> &mut Limits {
        self.vhost.limits_mut()
    }

    fn queue(&self, ring: &mut Ring, slots: u32) -> io::Result<VhostUserQueue> {
        self.vhost.queue(ring, slots)
    }
}
