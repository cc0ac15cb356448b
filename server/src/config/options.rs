//! The options of an export, each of them once: the fields of [`ExportOptions`] are options of `serve`, keys of a
//! SPEC, keys of `[defaults]` and `[[export]]` in a configuration file, and rows of `docs/export-options.md`.

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ErrorKind};
use clap::{ArgMatches, Args, Command, FromArgMatches};

use crate::door::ublk::{DataPath, Recovery};
use crate::engine::accounts::{Group, User};
use crate::engine::cpus::Cpus;
use crate::engine::polling::Polling;
use crate::engine::socket::SocketMode;
use crate::engine::throttle::RateLimits;
use crate::request::{Serial, parse_size};

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
    /// Open it where this machine can, else say once that it stays closed
    #[default]
    Auto,
    /// Open it or fail
    Yes,
    /// Leave it closed
    No,
}

/// Most queues of an export. The kernel's ublk driver allows more.
pub const MAX_QUEUES: u16 = 64;

/// Most requests in flight for each queue.
pub const MAX_DEPTH: u16 = 1024;

/// Longest time for which a disk is kept for a client that died.
const MAX_GRACE_SECONDS: u32 = 3600;

/// Most requests per second that can be a limit: none is let pass faster than the clock ticks.
const MAX_IOPS: u64 = 1_000_000_000;

/// Longest burst: an hour.
const MAX_BURST_MS: u32 = 3_600_000;

/// Seconds for which the disk is kept for a client that died, by default.
const DEFAULT_GRACE_SECONDS: u32 = 10;

/// What may be said of an export; everything may be missing.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct ExportOptions {
    /// Name the export, if it is the only one [default: NAME of the SPEC, else the file's name or the kind]
    #[arg(long)]
    pub name: Option<String>,

    /// Refuse writes at both doors [default: off]
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true,
        default_missing_value = "on", value_parser = switch)]
    pub read_only: Option<bool>,

    /// Give the disk a serial number of up to 20 printable ASCII characters, if it is the only one [default: the
    /// first 20 characters of the name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub serial: Option<String>,

    /// Give the disk logical blocks of 512, 1024, 2048 or 4096 bytes [default: what the storage takes, else 512]
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    pub block_size: Option<u32>,

    /// Take discards, and let write-zeroes release space; off: the storage keeps all its space allocated
    /// [default: on]
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true,
        default_missing_value = "on", value_parser = switch)]
    pub discard: Option<bool>,

    /// Serve the disk as a block device, /dev/ublkbN [default: auto]
    #[arg(long, value_enum, value_name = "MODE")]
    pub ublk: Option<DoorMode>,

    /// Ask for this N of /dev/ublkbN, if the export is the only one [default: the kernel's choice]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub ublk_id: Option<u32>,

    /// Choose how data gets from the block device to the storage and back [default: auto]
    #[arg(long, value_enum, value_name = "PATH")]
    pub ublk_data: Option<DataPath>,

    /// Run each queue thread of the block device only on the processors whose requests the kernel gives to its queue
    /// [default: yes with several queues, unless cpus is given or this process may not use all processors]
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true,
        default_missing_value = "yes", value_parser = switch)]
    pub ublk_affinity: Option<bool>,

    /// Keep the kernel from looking for partitions on the block device (Linux 7.0) [default: off]
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true,
        default_missing_value = "on", value_parser = switch)]
    pub no_partition_scan: Option<bool>,

    /// Choose what becomes of the block device when this server dies [default: auto]
    #[arg(long, value_enum, value_name = "ACTION")]
    pub ublk_recovery: Option<Recovery>,

    /// Serve the disk at a vhost-user-blk socket [default: auto]
    #[arg(long, value_enum, value_name = "MODE")]
    pub vhost: Option<DoorMode>,

    /// Listen for vhost-user clients here, if the export is the only one [default: in the runtime directory]
    #[arg(long, value_name = "PATH")]
    pub vhost_socket: Option<PathBuf>,

    /// Give the vhost-user socket to this user, by name or number [default: the server's]
    #[arg(long, value_name = "USER")]
    pub vhost_socket_owner: Option<User>,

    /// Give the vhost-user socket to this group, by name or number: its members may connect, unless
    /// vhost-socket-mode says otherwise [default: the server's]
    #[arg(long, value_name = "GROUP")]
    pub vhost_socket_group: Option<Group>,

    /// Give the vhost-user socket this mode, an octal number: who may write may connect [default: 0600, and 0660 with
    /// vhost-socket-group]
    #[arg(long, value_name = "MODE")]
    pub vhost_socket_mode: Option<SocketMode>,

    /// Give the admin socket to this user, by name or number [default: the server's]
    #[arg(long, value_name = "USER")]
    pub admin_socket_owner: Option<User>,

    /// Give the admin socket to this group, by name or number: its members may stop and change the export
    /// [default: the server's]
    #[arg(long, value_name = "GROUP")]
    pub admin_socket_group: Option<Group>,

    /// Give the admin socket this mode, an octal number [default: 0600, and 0660 with admin-socket-group]
    #[arg(long, value_name = "MODE")]
    pub admin_socket_mode: Option<SocketMode>,

    /// Offer this many queues at each door [default: one for each processor, at most 4]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = number(1..=MAX_QUEUES))]
    pub queues: Option<u16>,

    /// Serve the queues of a vhost-user client with this many threads, in turns; each queue of the block device has
    /// a thread of its own [default: one for each queue]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = number(1..=MAX_QUEUES))]
    pub vhost_threads: Option<u16>,

    /// Let guests move by live migration: let a second client connect, which takes the disk over when the first has
    /// stopped for it. With ublk=no the file is claimed only while a guest has it, so that the guest may also move
    /// to another server that has this option [default: off]
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true,
        default_missing_value = "on", value_parser = switch)]
    pub migration: Option<bool>,

    /// Let this many requests of each ublk queue be in flight [default: 128]
    #[arg(long, allow_negative_numbers = true, value_name = "N", value_parser = number(1..=MAX_DEPTH))]
    pub depth: Option<u16>,

    /// Run the queue threads of each door on these processors, like 2,4-7: one each, from the first again when
    /// there are more threads [default: anywhere]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<Cpus>,

    /// Those that can be changed while the export is served.
    #[command(flatten)]
    #[serde(flatten)]
    pub live: LiveOptions,
}

/// What may be said of an export also while it is served; everything may be missing.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct LiveOptions {
    /// Poll for this many microseconds before an idle queue thread sleeps, where that has paid off lately; 0: do not
    /// poll; always: never sleep, and keep a processor busy [default: 100]
    #[arg(long, allow_negative_numbers = true, value_name = "N|always")]
    pub poll_us: Option<Polling>,

    /// Keep the disk for a vhost-user client that died for this many seconds, before the block device is writable
    /// again [default: 10]
    #[arg(long, allow_negative_numbers = true, value_name = "SECONDS", value_parser = number(0..=MAX_GRACE_SECONDS))]
    pub reconnect_grace: Option<u32>,

    /// Let this many requests start per second: reads, writes, discards and write-zeroes, but no flushes. 0: any number
    /// [default: 0]
    #[arg(long, value_name = "N", value_parser = number(0..=MAX_IOPS))]
    pub iops_total: Option<u64>,

    /// Let this many reads start per second, beside any other limit. 0: any number [default: 0]
    #[arg(long, value_name = "N", value_parser = number(0..=MAX_IOPS))]
    pub iops_read: Option<u64>,

    /// Let this many writes, discards and write-zeroes start per second, beside any other limit. 0: any number
    /// [default: 0]
    #[arg(long, value_name = "N", value_parser = number(0..=MAX_IOPS))]
    pub iops_write: Option<u64>,

    /// Let this many bytes be read, written or zeroed per second, like 10M. 0: any number [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub bps_total: Option<u64>,

    /// Let this many bytes be read per second, beside any other limit. 0: any number [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub bps_read: Option<u64>,

    /// Let this many bytes be written or zeroed per second, beside any other limit. 0: any number [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub bps_write: Option<u64>,

    /// After a pause, let pass at once what the limits above allow in this many milliseconds [default: 100]
    #[arg(long, value_name = "N", value_parser = number(0..=MAX_BURST_MS))]
    pub burst_ms: Option<u32>,
}

impl LiveOptions {
    /// Takes other values.
    ///
    /// # Errors
    ///
    /// Which key is wrong, and why.
    pub(super) fn change(&mut self, options: &BTreeMap<String, String>) -> Result<(), String> {
        let pairs = options.iter();
        let pairs = pairs.map(|(key, value)| (key.as_str(), Some(value.as_str())));
        let keys = read_keys::<Self>(pairs).map_err(|error| {
            let live = keys_of::<Self>();
            let is_fixed = !live.contains(&error.key) && keys_of::<ExportOptions>().contains(&error.key);
            match is_fixed {
                true => format!(
                    "{} cannot be changed while the export is served: serve it again with other options (--take-over \
                     keeps its clients); what can be changed: {}, log",
                    error.key,
                    live.join(", ")
                ),
                false => error.to_string(),
            }
        })?;
        let updated = self.update_from_arg_matches(&keys);
        updated.map_err(|error| error.to_string())
    }

    /// All of them as keys and values, with the defaults of those that are missing.
    pub(super) fn values(&self) -> BTreeMap<String, String> {
        let limits = self.limits();
        let text = |(key, value): (&str, u64)| (key.to_owned(), value.to_string());
        let values = [
            ("reconnect-grace", self.reconnect_grace().as_secs()),
            ("iops-total", limits.iops_total),
            ("iops-read", limits.iops_read),
            ("iops-write", limits.iops_write),
            ("bps-total", limits.bps_total),
            ("bps-read", limits.bps_read),
            ("bps-write", limits.bps_write),
            ("burst-ms", limits.burst_ms.into()),
        ];
        let polling = ("poll-us".to_owned(), self.polling().to_string());
        values.map(text).into_iter().chain([polling]).collect()
    }

    /// What idle queue threads do.
    #[must_use]
    pub fn polling(&self) -> Polling {
        self.poll_us.unwrap_or_default()
    }

    /// For how long the disk is kept for a client that died.
    #[must_use]
    pub fn reconnect_grace(&self) -> Duration {
        let seconds = self.reconnect_grace.unwrap_or(DEFAULT_GRACE_SECONDS);
        Duration::from_secs(seconds.into())
    }

    /// The limits on clients.
    #[must_use]
    pub fn limits(&self) -> RateLimits {
        let none = RateLimits::default();
        RateLimits {
            iops_total: self.iops_total.unwrap_or(none.iops_total),
            iops_read: self.iops_read.unwrap_or(none.iops_read),
            iops_write: self.iops_write.unwrap_or(none.iops_write),
            bps_total: self.bps_total.unwrap_or(none.bps_total),
            bps_read: self.bps_read.unwrap_or(none.bps_read),
            bps_write: self.bps_write.unwrap_or(none.bps_write),
            burst_ms: self.burst_ms.unwrap_or(none.burst_ms),
        }
    }
}

impl ExportOptions {
    /// The options given that several exports cannot share, as on the command line.
    pub fn unshareable(&self) -> impl Iterator<Item = &'static str> {
        [
            ("--name", self.name.is_some()),
            ("--serial", self.serial.is_some()),
            ("--ublk-id", self.ublk_id.is_some()),
            ("--vhost-socket", self.vhost_socket.is_some()),
        ]
        .into_iter()
        .filter_map(|(flag, given)| given.then_some(flag))
    }
}

/// Why a key, or its value, is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {why}")]
pub struct BadOption {
    /// The key.
    pub key: String,
    /// The value and what is allowed; for an unknown key one that is similar.
    pub why: String,
    /// Whether there is no such key.
    pub is_unknown: bool,
}

impl BadOption {
    fn unknown(key: String, similar: Option<String>) -> Self {
        let hint = similar.map(|similar| format!("; did you mean '{similar}'?"));
        Self {
            key,
            why: format!("unknown key{}", hint.unwrap_or_default()),
            is_unknown: true,
        }
    }
}

/// The keys of these options.
fn keys_of<A: Args>() -> Vec<String> {
    let command = A::augment_args(Command::new("keys"));
    let keys = command.get_arguments().filter_map(clap::Arg::get_long);
    keys.map(str::to_owned).collect()
}

/// Reads options given as keys and values, with the parser of the command line. The result updates options that
/// were given elsewhere with [`clap::FromArgMatches::update_from_arg_matches`].
pub(super) fn read_keys<'a, A: Args>(
    pairs: impl IntoIterator<Item = (&'a str, Option<&'a str>)>,
) -> Result<ArgMatches, BadOption> {
    let mut words = Vec::new();
    for (key, value) in pairs {
        if key.is_empty() || key.starts_with('-') {
            return Err(BadOption::unknown(key.to_owned(), None));
        }
        words.push(match value {
            Some(value) => format!("--{key}={value}"),
            None => format!("--{key}"),
        });
    }
    A::augment_args(Command::new("keys"))
        .no_binary_name(true)
        .disable_help_flag(true)
        .args_override_self(true)
        .try_get_matches_from(words)
        .map_err(|error| refusal(&error))
}

/// The key and the reason out of an error of the command line's parser.
fn refusal(error: &clap::Error) -> BadOption {
    let context = |kind| error.get(kind).map(ToString::to_string);
    let key_of = |argument: String| {
        let name = argument.trim_start_matches('-');
        let end = name.find([' ', '=', '[']).unwrap_or(name.len());
        name[..end].to_owned()
    };
    let key = context(ContextKind::InvalidArg).map_or(String::new(), key_of);
    if error.kind() == ErrorKind::UnknownArgument {
        let similar = context(ContextKind::SuggestedArg).map(key_of);
        return BadOption::unknown(key, similar);
    }
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let values = context(ContextKind::ValidValue).filter(|values| !values.is_empty());
    let allowed = match (error.source(), values) {
        (Some(source), _) => source.to_string(),
        (None, Some(values)) => format!("give one of {values}"),
        (None, None) => "give a value".to_owned(),
    };
    BadOption {
        key,
        why: match value.is_empty() {
            true => allowed,
            false => format!("invalid value '{value}': {allowed}"),
        },
        is_unknown: false,
    }
}

/// A value that is on or off.
///
/// # Errors
///
/// What may be given.
pub fn switch(text: &str) -> Result<bool, &'static str> {
    match text {
        "on" | "yes" | "true" => Ok(true),
        "off" | "no" | "false" => Ok(false),
        _ => Err("give on or off"),
    }
}

fn number<T>(allowed: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: std::str::FromStr + PartialOrd + std::fmt::Display + Clone,
{
    move |text| {
        text.parse()
            .ok()
            .filter(|number| allowed.contains(number))
            .ok_or_else(|| {
                let (first, last) = (allowed.start(), allowed.end());
                format!("give a number from {first} to {last}")
            })
    }
}

fn serial(text: &str) -> Result<String, String> {
    let serial = Serial::new(text).map_err(|error| error.to_string())?;
    Ok(serial.as_str().to_owned())
}

fn block_size(text: &str) -> Result<u32, &'static str> {
    match text.parse() {
        Ok(bytes @ (512 | 1024 | 2048 | 4096)) => Ok(bytes),
        _ => Err("give 512, 1024, 2048 or 4096"),
    }
}

#[cfg(test)]
#[path = "options_tests.rs"]
mod tests;
