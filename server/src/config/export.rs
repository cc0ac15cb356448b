//! One export, validated.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::FromArgMatches;

use super::commas;
use super::error::ConfigError;
use super::name::check_name;
use super::options::{DoorMode, ExportOptions, LiveOptions};
use super::spec::{Spec, StorageSpec};
use crate::door::ublk::{DataPath, Recovery};
use crate::engine::accounts::{Group, User};
use crate::engine::socket::SocketAccess;
use crate::engine::threads::ThreadOptions;
use crate::request::{SECTOR_BYTES, SERIAL_BYTES, Serial};
#[cfg(feature = "testing")]
use crate::storage::Rule;

/// Requests in flight for each ublk queue by default.
const DEFAULT_DEPTH: u16 = 128;

/// Queues by default: one for each processor, at most this many.
const DEFAULT_MAX_QUEUES: usize = 4;

/// One export, validated: what to serve, and through which doors. Fields without a comment are as in
/// [`ExportOptions`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each option is documented once")]
pub struct ExportConfig {
    /// Unique on this machine.
    pub name: String,
    /// Where the data lives; no relative path.
    pub storage: StorageSpec,
    /// How the storage shall fail, for tests.
    #[cfg(feature = "testing")]
    pub faults: Vec<Rule>,
    pub read_only: bool,
    pub serial: Serial,
    /// Logical block size asked for; the storage's own when none was.
    pub block_bytes: Option<u32>,
    pub discard: bool,
    pub ublk: DoorMode,
    pub ublk_id: Option<u32>,
    pub ublk_data: DataPath,
    pub ublk_affinity: Option<bool>,
    /// Whether the kernel looks for partitions on the block device.
    pub scan_partitions: bool,
    pub recovery: Recovery,
    pub vhost: DoorMode,
    /// Where the vhost-user door listens; in the runtime directory when there is no path.
    pub vhost_socket: Option<PathBuf>,
    /// Who may connect to it.
    pub vhost_access: SocketAccess,
    /// Who may connect to the admin socket.
    pub admin_access: SocketAccess,
    pub queues: u16,
    pub vhost_threads: u16,
    pub migration: bool,
    pub depth: u16,
    /// How queue threads run.
    pub threads: ThreadOptions,
    pub live: LiveOptions,
    /// What was asked for, to ask for it again.
    pub saved: SavedExport,
}

impl ExportConfig {
    /// The export of a SPEC, whose keys have precedence over `options`. Relative paths are relative to `folder`.
    ///
    /// # Errors
    ///
    /// When two options contradict each other, or what was asked for cannot be on this machine.
    pub fn new(spec: Spec, options: ExportOptions, folder: &Path) -> Result<Self, ConfigError> {
        spec.check_path(folder)?;
        Self::with(spec, options, BTreeMap::new(), folder)
    }

    /// This configuration with options that are changed while it is served. All others stay what they were when it
    /// began: the machine may have changed since then, and a confined server cannot look.
    ///
    /// # Errors
    ///
    /// Which option is wrong, or cannot be changed.
    pub fn change(&self, options: BTreeMap<String, String>) -> Result<Self, ConfigError> {
        let mut changed = self.clone();
        changed.live.change(&options).map_err(ConfigError::new)?;
        changed.saved.changed.extend(options);
        Ok(changed)
    }

    /// As [`new`](Self::new), with options that were changed while it was served, which have precedence over all.
    fn with(
        spec: Spec,
        options: ExportOptions,
        changed: BTreeMap<String, String>,
        folder: &Path,
    ) -> Result<Self, ConfigError> {
        let mut given = options.clone();
        given
            .update_from_arg_matches(&spec.options)
            .map_err(|error| ConfigError::new(error.to_string()))?;
        given.live.change(&changed).map_err(ConfigError::new)?;
        let name = match (&spec.name, &given.name) {
            (Some(a), Some(b)) if a != b => {
                return Err(ConfigError::new(format!(
                    "the export is called '{a}' in its SPEC and '{b}' by its name option: drop one"
                )));
            }
            (Some(name), _) | (None, Some(name)) => name.clone(),
            (None, None) => spec.storage.default_name(),
        };
        check_name(&name)?;
        let refuse = |why: String| ConfigError::new(format!("export '{name}': {why}"));
        check_combination(&spec, &given).map_err(refuse)?;
        let saved = SavedExport {
            folder: folder.to_owned(),
            spec: spec.text,
            options: ExportOptions {
                name: Some(name.clone()),
                ..options
            },
            changed,
            origin: Origin::default(),
        };
        let serial = match given.serial {
            Some(serial) => serial,
            None => name.chars().take(SERIAL_BYTES).collect(),
        };
        let serial = Serial::new(&serial).map_err(|error| refuse(error.to_string()))?;
        let queues = given.queues.unwrap_or_else(default_queues);
        let vhost_threads = given.vhost_threads.unwrap_or(queues);
        if vhost_threads > queues {
            return Err(refuse(format!(
                "vhost-threads: {vhost_threads} is more than the queues ({queues}): give 1 to {queues}"
            )));
        }
        Ok(Self {
            storage: spec.storage.resolved(folder),
            #[cfg(feature = "testing")]
            faults: spec.faults,
            read_only: given.read_only.unwrap_or(false),
            serial,
            block_bytes: given.block_size,
            discard: given.discard.unwrap_or(true),
            ublk: given.ublk.unwrap_or_default(),
            ublk_id: given.ublk_id,
            ublk_data: given.ublk_data.unwrap_or_default(),
            ublk_affinity: given.ublk_affinity,
            scan_partitions: !given.no_partition_scan.unwrap_or(false),
            recovery: given.ublk_recovery.unwrap_or_default(),
            vhost: given.vhost.unwrap_or_default(),
            vhost_socket: given.vhost_socket.map(|path| folder.join(path)),
            vhost_access: SocketAccess {
                owner: given.vhost_socket_owner,
                group: given.vhost_socket_group,
                mode: given.vhost_socket_mode,
            },
            admin_access: SocketAccess {
                owner: given.admin_socket_owner,
                group: given.admin_socket_group,
                mode: given.admin_socket_mode,
            },
            queues,
            vhost_threads,
            migration: given.migration.unwrap_or(false),
            depth: given.depth.unwrap_or(DEFAULT_DEPTH),
            threads: ThreadOptions {
                polling: Arc::new(given.live.polling().into()),
                cpus: given.cpus,
            },
            live: given.live,
            saved,
            name,
        })
    }

    /// The storage as users read it.
    #[must_use]
    pub fn storage_text(&self) -> String {
        #[cfg(feature = "testing")]
        if !self.faults.is_empty() {
            return format!("fault:…;{}", self.storage);
        }
        self.storage.to_string()
    }
}

/// Checks what no option says alone.
fn check_combination(spec: &Spec, given: &ExportOptions) -> Result<(), String> {
    let is_off = |door: Option<DoorMode>| door == Some(DoorMode::No);
    let ublk_off = is_off(given.ublk);
    let vhost_off = is_off(given.vhost);
    let stays = matches!(
        given.ublk_recovery,
        Some(Recovery::Reissue | Recovery::FailIo)
    );
    let contradictions = [
        (
            ublk_off && vhost_off,
            "ublk and vhost are both 'no': leave one of the doors on",
        ),
        (
            ublk_off && given.ublk_id.is_some(),
            "ublk-id is given, but ublk is 'no': drop one",
        ),
        (
            vhost_off && given.vhost_socket.is_some(),
            "vhost-socket is given, but vhost is 'no': drop one",
        ),
        (
            vhost_off && given.migration == Some(true),
            "migration is for guests of the vhost-user door, but vhost is 'no': drop one",
        ),
        (
            given.ublk_affinity == Some(true) && given.cpus.is_some(),
            "cpus and ublk-affinity both say where queue threads run: drop one",
        ),
        (
            stays && matches!(spec.storage, StorageSpec::Memory { .. }),
            "ublk-recovery: what is in memory is lost with the server, so the block device cannot stay: give auto or \
             off",
        ),
    ];
    if let Some((_, why)) = contradictions.iter().find(|(is_so, _)| *is_so) {
        return Err((*why).to_owned());
    }
    if let StorageSpec::Null { size_bytes } | StorageSpec::Memory { size_bytes } = spec.storage {
        let block_bytes = given.block_size.map_or(SECTOR_BYTES, u64::from);
        if !size_bytes.is_multiple_of(block_bytes) {
            return Err(format!(
                "a size of {size_bytes} bytes is not a multiple of the block size, {block_bytes}"
            ));
        }
    }
    match &given.cpus {
        Some(cpus) => cpus.check_usable().map_err(|why| format!("cpus: {why}")),
        None => Ok(()),
    }
}

/// What a server was asked to serve, for one that recovers the export or takes it over.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SavedExport {
    /// Where relative paths begin.
    pub folder: PathBuf,
    /// The SPEC.
    pub spec: String,
    /// The options from elsewhere.
    pub options: ExportOptions,
    /// Those that were changed while it was served.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub changed: BTreeMap<String, String>,
    /// By whom.
    #[serde(default, skip_serializing_if = "Origin::is_default")]
    pub origin: Origin,
}

/// Who asked a server for an export.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// Its command line.
    #[default]
    CommandLine,
    /// Its configuration file.
    Config,
    /// `ublkup add`, while the server of this name ran.
    Added(String),
}

impl Origin {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What is to be changed of an export so that it is as another configuration says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Keys and values that can be changed while it is served.
    pub live: BTreeMap<String, String>,
    /// The other keys.
    pub fixed: Vec<String>,
}

impl SavedExport {
    /// The export again.
    ///
    /// # Errors
    ///
    /// When it can no longer be served as it was.
    pub fn export(self) -> Result<ExportConfig, ConfigError> {
        let Self {
            folder,
            spec,
            options,
            changed,
            origin,
        } = self;
        let mut config = ExportConfig::with(spec.parse()?, options, changed, &folder)?;
        config.saved.origin = origin;
        Ok(config)
    }

    /// What is given in all places, but for what was changed while it was served.
    fn given(&self) -> Result<ExportOptions, ConfigError> {
        let spec: Spec = self.spec.parse()?;
        let mut given = self.options.clone();
        given
            .update_from_arg_matches(&spec.options)
            .map_err(|error| ConfigError::new(error.to_string()))?;
        for owner in [&mut given.vhost_socket_owner, &mut given.admin_socket_owner] {
            *owner = owner.as_ref().map(User::by_number);
        }
        for group in [&mut given.vhost_socket_group, &mut given.admin_socket_group] {
            *group = group.as_ref().map(Group::by_number);
        }
        Ok(given)
    }

    /// The same with users and groups by number, for a server that cannot look them up.
    ///
    /// # Errors
    ///
    /// When it makes no sense on this machine.
    pub fn by_number(self) -> Result<Self, ConfigError> {
        const ACCOUNTS: [&str; 4] = [
            "vhost-socket-owner",
            "vhost-socket-group",
            "admin-socket-owner",
            "admin-socket-group",
        ];
        let given = self.given()?;
        let mut parts = commas::split(&self.spec);
        parts.retain(|part| !ACCOUNTS.contains(&commas::key_value(part).0));
        let parts: Vec<_> = parts.iter().map(|part| commas::escape(part)).collect();
        let options = ExportOptions {
            vhost_socket_owner: given.vhost_socket_owner,
            vhost_socket_group: given.vhost_socket_group,
            admin_socket_owner: given.admin_socket_owner,
            admin_socket_group: given.admin_socket_group,
            ..self.options
        };
        Ok(Self {
            spec: parts.join(","),
            options,
            ..self
        })
    }

    /// What is to be changed of an export that is served so, so that it is as `wanted`.
    ///
    /// # Errors
    ///
    /// When it makes no sense any more how it is served.
    pub fn difference(&self, wanted: &ExportConfig) -> Result<Difference, ConfigError> {
        let now = self.clone().export()?;
        let (old, new) = (now.live.values(), wanted.live.values());
        let live = new
            .into_iter()
            .filter(|(key, value)| old.get(key) != Some(value));
        let mut difference = Difference {
            live: live.collect(),
            fixed: Vec::new(),
        };
        let alike = ExportConfig {
            live: now.live.clone(),
            saved: now.saved.clone(),
            ..wanted.clone()
        };
        if now.storage != wanted.storage {
            difference.fixed.push("spec".into());
        }
        if now != alike {
            let live = &now.live;
            let options = |saved: &Self| {
                let given = ExportOptions {
                    name: None,
                    live: live.clone(),
                    ..saved.given()?
                };
                serde_json::to_value(given).map_err(|error| ConfigError::new(error.to_string()))
            };
            let (old, new) = (options(self)?, options(&wanted.saved)?);
            let keys = new.as_object().into_iter().flatten();
            let differ = keys.filter(|(key, value)| old.get(key) != Some(value));
            difference.fixed.extend(differ.map(|(key, _)| key.clone()));
        }
        Ok(difference)
    }
}

fn default_queues() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    // No truncation: it is small.
    u16::try_from(processors.min(DEFAULT_MAX_QUEUES)).unwrap_or(1)
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
        let why = if !names.insert(name) {
            format!("two exports are called '{name}': name one of them with NAME=…")
        } else if export.ublk_id.is_some_and(|id| !ids.insert(id)) {
            format!("export '{name}': ublk-id: another export asks for the same number")
        } else if (export.vhost_socket.as_ref()).is_some_and(|path| !sockets.insert(path)) {
            format!("export '{name}': vhost-socket: another export asks for the same path")
        } else {
            continue;
        };
        return Err(ConfigError::new(why));
    }
    Ok(())
}

#[cfg(test)]
#[path = "export_tests.rs"]
mod tests;
