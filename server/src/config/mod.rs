//! Arguments and files become one validated [`ExportConfig`] per export.

mod file;
mod spec;

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

pub use file::read_file;
pub use spec::{Spec, StorageSpec};

use crate::door::ublk::{DataPath, Recovery};
use crate::engine::cpus::Cpus;
use crate::engine::polling::Polling;
use crate::engine::threads::ThreadOptions;
use crate::request::{BadSize, Serial};
use crate::storage::Rule;

/// Whether a door is to be opened.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum DoorMode {
    /// If this machine can, else without it (and said once).
    #[default]
    Auto,
    /// Or fail.
    Yes,
    /// Never.
    No,
}

/// Queues per export at most. The kernel's ublk driver allows more; nobody needs them.
pub const MAX_QUEUES: u16 = 64;

/// Requests per queue at most.
pub const MAX_DEPTH: u16 = 1024;

/// How long the disk is kept for a client that died, when nobody says.
const DEFAULT_GRACE_SECONDS: u32 = 10;

/// Longest time to keep it.
const MAX_GRACE_SECONDS: u32 = 3600;

/// One export, validated: what to serve, and through which doors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportConfig {
    /// Unique on this machine.
    pub name: String,
    /// Where the data lives.
    pub backend: StorageSpec,
    /// How the disk shall fail, for tests.
    pub faults: Vec<Rule>,
    /// Writes are refused at both doors.
    pub read_only: bool,
    /// What the disk calls itself.
    pub serial: Serial,
    /// Logical block size asked for; the backend's own when none was.
    pub block_bytes: Option<u32>,
    /// The block door.
    pub ublk: DoorMode,
    /// The number N of `/dev/ublkbN`; the kernel chooses when there is none.
    pub ublk_id: Option<u32>,
    /// How data gets from the block door to the backend and back.
    pub ublk_data: DataPath,
    /// Whether queue threads of the block door run only where their queue's requests come from; if nobody
    /// says, they do unless somebody chose processors for them in another way.
    pub ublk_affinity: Option<bool>,
    /// Whether the kernel looks for partitions on the block device.
    pub scan_partitions: bool,
    /// What becomes of the block device when the server dies.
    pub recovery: Recovery,
    /// The vhost door.
    pub vhost: DoorMode,
    /// Where the vhost door listens; in the runtime directory when there is no path.
    pub vhost_socket: Option<PathBuf>,
    /// Queues of each door.
    pub queues: u16,
    /// Threads that serve the queues of a vhost client. Each queue of the block door has its own.
    pub vhost_threads: u16,
    /// Whether the memory of vhost clients is pinned.
    pub vhost_pin_memory: bool,
    /// Whether guests may move: from one vhost client to another, and without a block door also from
    /// server to server.
    pub migration: bool,
    /// Requests under way per ublk queue.
    pub depth: u16,
    /// How queue threads run.
    pub threads: ThreadOptions,
    /// How long the disk is kept for a vhost client that died.
    pub reconnect_grace: Duration,
    /// What was asked for, to ask for it again.
    pub served_as: ServedAs,
}

/// What may be said of an export on the command line or in a file; everything may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ExportOptions {
    /// See [`ExportConfig::name`].
    pub name: Option<String>,
    /// See [`ExportConfig::read_only`].
    pub read_only: Option<bool>,
    /// See [`ExportConfig::ublk`].
    pub ublk: Option<DoorMode>,
    /// See [`ExportConfig::ublk_id`].
    pub ublk_id: Option<u32>,
    /// See [`ExportConfig::ublk_data`].
    pub ublk_data: Option<DataPath>,
    /// See [`ExportConfig::ublk_affinity`].
    pub ublk_affinity: Option<bool>,
    /// The contrary of [`ExportConfig::scan_partitions`].
    pub no_partition_scan: Option<bool>,
    /// See [`ExportConfig::recovery`].
    pub ublk_recovery: Option<Recovery>,
    /// See [`ExportConfig::vhost`].
    pub vhost: Option<DoorMode>,
    /// See [`ExportConfig::vhost_socket`].
    pub vhost_socket: Option<PathBuf>,
    /// See [`ExportConfig::queues`].
    pub queues: Option<u16>,
    /// See [`ExportConfig::vhost_threads`].
    pub vhost_threads: Option<u16>,
    /// See [`ExportConfig::migration`].
    pub migration: Option<bool>,
    /// See [`ExportConfig::vhost_pin_memory`].
    pub vhost_pin_memory: Option<bool>,
    /// See [`ExportConfig::depth`].
    pub depth: Option<u16>,
    /// See [`ThreadOptions::polling`]; in microseconds, or `always`.
    pub poll_us: Option<Polling>,
    /// See [`ThreadOptions::cpus`].
    pub cpus: Option<Cpus>,
    /// See [`ExportConfig::reconnect_grace`]; in seconds.
    pub reconnect_grace: Option<u32>,
}

/// Why a configuration cannot be served. One line each, for the person who wrote it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

impl From<BadSize> for ConfigError {
    fn from(error: BadSize) -> Self {
        Self::new(error.to_string())
    }
}

impl ConfigError {
    fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

impl ExportOptions {
    /// These options, and `other`'s where these say nothing.
    #[must_use]
    pub fn or(self, other: &Self) -> Self {
        Self {
            name: self.name.or_else(|| other.name.clone()),
            read_only: self.read_only.or(other.read_only),
            ublk: self.ublk.or(other.ublk),
            ublk_id: self.ublk_id.or(other.ublk_id),
            ublk_data: self.ublk_data.or(other.ublk_data),
            ublk_affinity: self.ublk_affinity.or(other.ublk_affinity),
            no_partition_scan: self.no_partition_scan.or(other.no_partition_scan),
            ublk_recovery: self.ublk_recovery.or(other.ublk_recovery),
            vhost: self.vhost.or(other.vhost),
            vhost_socket: self.vhost_socket.or_else(|| other.vhost_socket.clone()),
            queues: self.queues.or(other.queues),
            vhost_threads: self.vhost_threads.or(other.vhost_threads),
            migration: self.migration.or(other.migration),
            vhost_pin_memory: self.vhost_pin_memory.or(other.vhost_pin_memory),
            depth: self.depth.or(other.depth),
            poll_us: self.poll_us.or(other.poll_us),
            cpus: self.cpus.or_else(|| other.cpus.clone()),
            reconnect_grace: self.reconnect_grace.or(other.reconnect_grace),
        }
    }

    /// The export that `spec` and these options describe.
    ///
    /// # Errors
    ///
    /// When a value is out of its bounds or two contradict each other.
    pub fn export(self, spec: Spec) -> Result<ExportConfig, ConfigError> {
        let options = self.clone();
        let name = match (spec.name, self.name) {
            (Some(name), None) | (None, Some(name)) => name,
            (None, None) => spec.backend.default_name(),
            (Some(a), Some(b)) if a == b => a,
            (Some(a), Some(b)) => {
                return Err(ConfigError::new(format!(
                    "the export is called '{a}' in its SPEC and '{b}' in its name option: drop one"
                )));
            }
        };
        check_name(&name)?;
        let served_as = ServedAs {
            folder: std::env::current_dir().unwrap_or_default(),
            spec: spec.text,
            options: Self {
                name: Some(name.clone()),
                ..options
            },
        };
        let recovery = self.ublk_recovery.unwrap_or_default();
        let stays = matches!(recovery, Recovery::Reissue | Recovery::FailIo);
        if stays && matches!(spec.backend, StorageSpec::Memory { .. }) {
            return Err(ConfigError::new(format!(
                "{name}: what is in memory goes with its server, so its block device cannot stay: \
                 leave --ublk-recovery away"
            )));
        }
        let serial = match &spec.serial {
            Some(text) => text.clone(),
            None => name
                .chars()
                .take(crate::request::SERIAL_BYTES)
                .collect::<String>(),
        };
        let serial = Serial::new(&serial)
            .map_err(|error| ConfigError::new(format!("{name}: serial '{serial}': {error}")))?;
        let queues = self.queues.unwrap_or_else(default_queues);
        if queues == 0 || queues > MAX_QUEUES {
            return Err(ConfigError::new(format!(
                "{name}: {queues} queues: give 1 to {MAX_QUEUES}"
            )));
        }
        let vhost_threads = self.vhost_threads.unwrap_or(queues);
        if vhost_threads == 0 || vhost_threads > queues {
            return Err(ConfigError::new(format!(
                "{name}: {vhost_threads} threads for {queues} queues: give 1 to {queues}"
            )));
        }
        let depth = self.depth.unwrap_or(128);
        if depth == 0 || depth > MAX_DEPTH {
            return Err(ConfigError::new(format!(
                "{name}: a depth of {depth}: give 1 to {MAX_DEPTH}"
            )));
        }
        let grace = self.reconnect_grace.unwrap_or(DEFAULT_GRACE_SECONDS);
        if grace > MAX_GRACE_SECONDS {
            return Err(ConfigError::new(format!(
                "{name}: a reconnect grace of {grace} s: give 0 to {MAX_GRACE_SECONDS}"
            )));
        }
        let (ublk, vhost) = (
            self.ublk.unwrap_or_default(),
            self.vhost.unwrap_or_default(),
        );
        if (ublk, vhost) == (DoorMode::No, DoorMode::No) {
            return Err(ConfigError::new(format!(
                "{name}: both doors are switched off: leave --ublk or --vhost on"
            )));
        }
        if ublk == DoorMode::No && self.ublk_id.is_some() {
            return Err(ConfigError::new(format!(
                "{name}: a ublk id, but --ublk no: drop one"
            )));
        }
        if self.ublk_affinity == Some(true) && self.cpus.is_some() {
            return Err(ConfigError::new(format!(
                "{name}: --cpus and --ublk-affinity both say where queue threads run: drop one"
            )));
        }
        if vhost == DoorMode::No && self.vhost_socket.is_some() {
            return Err(ConfigError::new(format!(
                "{name}: a vhost socket, but --vhost no: drop one"
            )));
        }
        let migration = self.migration.unwrap_or(false);
        if vhost == DoorMode::No && migration {
            return Err(ConfigError::new(format!(
                "{name}: --migration is for guests of the vhost door, but --vhost no: drop one"
            )));
        }
        Ok(ExportConfig {
            read_only: spec.read_only || self.read_only.unwrap_or(false),
            name,
            backend: spec.backend,
            faults: spec.faults,
            serial,
            block_bytes: spec.block_bytes,
            ublk,
            ublk_id: self.ublk_id,
            ublk_data: self.ublk_data.unwrap_or_default(),
            ublk_affinity: self.ublk_affinity,
            scan_partitions: !self.no_partition_scan.unwrap_or(false),
            recovery,
            vhost,
            vhost_socket: self.vhost_socket,
            queues,
            vhost_threads,
            migration,
            vhost_pin_memory: self.vhost_pin_memory.unwrap_or(false),
            depth,
            threads: ThreadOptions {
                polling: self.poll_us.unwrap_or_default(),
                cpus: self.cpus,
            },
            reconnect_grace: Duration::from_secs(grace.into()),
            served_as,
        })
    }
}

/// What a server was asked to serve, for one that is to go on with it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ServedAs {
    /// Where relative paths begin.
    pub folder: PathBuf,
    /// The SPEC.
    pub spec: String,
    /// The options.
    pub options: ExportOptions,
}

impl ServedAs {
    /// The export again. This process goes to the folder from which relative paths are meant.
    ///
    /// # Errors
    ///
    /// When it can no longer be served as it was.
    pub fn export(self) -> Result<ExportConfig, ConfigError> {
        std::env::set_current_dir(&self.folder)
            .map_err(|error| ConfigError::new(format!("{}: {error}", self.folder.display())))?;
        self.options.export(self.spec.parse()?)
    }
}

/// Queue threads when nobody says: one per processor, four at most.
fn default_queues() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(processors.min(4)).unwrap_or(4)
}

/// Checks that no two exports claim the same name, device or socket.
///
/// # Errors
///
/// When two do.
pub fn check_together(exports: &[ExportConfig]) -> Result<(), ConfigError> {
    let mut names = HashSet::new();
    let mut ids = HashSet::new();
    let mut sockets = HashSet::new();
    for export in exports {
        let name = &export.name;
        if !names.insert(name) {
            return Err(ConfigError::new(format!(
                "two exports are called '{name}': name one of them with NAME=…"
            )));
        }
        if let Some(id) = export.ublk_id
            && !ids.insert(id)
        {
            return Err(ConfigError::new(format!(
                "{name}: another export already asks for ublk id {id}"
            )));
        }
        if let Some(path) = &export.vhost_socket
            && !sockets.insert(path)
        {
            return Err(ConfigError::new(format!(
                "{name}: another export already asks for the socket {}",
                path.display()
            )));
        }
    }
    Ok(())
}

/// Checks that a name can be a folder, a part of a socket path and a word in a table.
///
/// # Errors
///
/// When it cannot.
pub fn check_name(name: &str) -> Result<(), ConfigError> {
    let ok = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with(['.', '-']);
    if ok {
        return Ok(());
    }
    Err(ConfigError::new(format!(
        "'{name}' is no name for an export: 1 to 64 letters, digits, '.', '_' or '-', \
         the first neither '.' nor '-' (set one with NAME=… before the SPEC)"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn export(spec: &str, options: ExportOptions) -> Result<ExportConfig, String> {
        let spec: Spec = spec.parse().map_err(|e: ConfigError| e.to_string())?;
        options.export(spec).map_err(|error| error.to_string())
    }

    #[test]
    fn names_come_from_the_spec_then_the_option_then_the_path() {
        let none = ExportOptions::default;
        let named = |name: &str| ExportOptions {
            name: Some(name.into()),
            ..none()
        };
        assert_eq!(export("a=null:1G", none()).unwrap().name, "a");
        assert_eq!(export("null:1G", named("b")).unwrap().name, "b");
        assert_eq!(export("file:/x/disk.img", none()).unwrap().name, "disk");
        assert_eq!(export("mem:1G", none()).unwrap().name, "mem");
        assert!(export("a=mem:1G", named("b")).is_err());
    }

    #[test]
    fn names_that_could_leave_the_runtime_directory_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            ".x",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(65),
        ] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        for good in ["a", "disk-1.img_2", &"x".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn contradictions_and_bounds_are_told() {
        let options = |change: fn(&mut ExportOptions)| {
            let mut options = ExportOptions::default();
            change(&mut options);
            export("null:1G", options).unwrap_err()
        };
        assert!(options(|o| o.queues = Some(0)).contains("0 queues"));
        assert!(options(|o| o.queues = Some(65)).contains("65 queues"));
        let threads = |queues, threads| {
            let options = ExportOptions {
                queues: Some(queues),
                vhost_threads: threads,
                ..ExportOptions::default()
            };
            export("null:1G", options).map(|export| export.vhost_threads)
        };
        assert_eq!((threads(8, None), threads(8, Some(2))), (Ok(8), Ok(2)));
        assert!(threads(2, Some(3)).unwrap_err().contains("3 threads for 2"));
        assert!(threads(2, Some(0)).unwrap_err().contains("0 threads"));
        assert!(options(|o| o.depth = Some(0)).contains("depth of 0"));
        assert!(options(|o| o.reconnect_grace = Some(3601)).contains("grace of 3601 s"));
        assert!(
            options(|o| (o.ublk, o.vhost) = (Some(DoorMode::No), Some(DoorMode::No)))
                .contains("both doors")
        );
        assert!(
            options(|o| (o.ublk, o.ublk_id) = (Some(DoorMode::No), Some(1))).contains("ublk id")
        );
        assert!(
            options(|o| (o.ublk_affinity, o.cpus) = (Some(true), "1".parse().ok()))
                .contains("both say where")
        );
    }

    #[test]
    fn exports_that_collide_are_told_by_name() {
        let one = export("a=null:1G", ExportOptions::default()).unwrap();
        let mut two = one.clone();
        assert!(check_together(&[one.clone(), two.clone()]).is_err());
        two.name = "b".into();
        assert!(check_together(&[one.clone(), two.clone()]).is_ok());
        let (mut one, mut two) = (one, two);
        (one.ublk_id, two.ublk_id) = (Some(3), Some(3));
        let error = check_together(&[one, two]).unwrap_err().to_string();
        assert!(error.contains("ublk id 3"), "{error}");
    }

    #[test]
    fn a_long_name_makes_a_serial_that_fits() {
        let name = "a-name-with-more-than-twenty-characters";
        let config = export(&format!("{name}=null:1G"), ExportOptions::default()).unwrap();
        assert_eq!(config.serial.as_str(), &name[..20]);
    }
}
