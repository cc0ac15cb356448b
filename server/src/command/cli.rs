//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::ArgValueCandidates;

use super::names::{export_names, server_names};
use super::serve_args::{Add, PredecessorOptions, SandboxOption, Serve, export_name};
use crate::engine::log::{self, LogFormat};

/// Exit code for wrong usage; clap's own.
pub const USAGE: u8 = 2;

/// Exit code for a block device that cannot be upgraded.
pub const NOT_UPGRADABLE: u8 = 3;

/// The version; a build that is not for use says so.
const VERSION: &str = match cfg!(feature = "testing") {
    true => concat!(env!("CARGO_PKG_VERSION"), " with test equipment"),
    false => env!("CARGO_PKG_VERSION"),
};

/// Serve disks as /dev/ublkbN block devices and as vhost-user-blk sockets, from one storage.
#[derive(Debug, Parser)]
#[command(
    name = "ublkup",
    version = VERSION,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not upgradable.\n\
                  Messages go to standard error, data to standard output."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Keep sockets and locks in this folder [default: /run/ublkup for root, else $XDG_RUNTIME_DIR/ublkup]
    #[arg(long, global = true, value_name = "DIR", env = "UBLKUP_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// Log what is at least this severe: error, warn, info, debug, trace or off; also for single modules, like
    /// info,ublkup::door=debug
    #[arg(
        long,
        global = true,
        value_name = "LEVEL",
        env = "UBLKUP_LOG",
        default_value = "info",
        value_parser = log::check_filter
    )]
    pub log: String,

    /// Write the log in this format
    #[arg(
        long,
        global = true,
        value_enum,
        value_name = "FORMAT",
        env = "UBLKUP_LOG_FORMAT",
        default_value = "text"
    )]
    pub log_format: LogFormat,
}

/// The commands of `ublkup snapshot`.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Keep what the disk holds now as FILE; requests wait for a moment
    ///
    /// FILE is the image as it was, and must not be changed from then on: a new image over it has its place. A guest that
    /// has a file system mounted should have it frozen meanwhile (fsfreeze), or FILE is like the disk of a machine that lost
    /// power.
    Create {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// The snapshot, a new file on the file system of the image
        file: PathBuf,
    },
    /// Write what was written since a snapshot into it, which then is the image again
    ///
    /// The disk holds what it held; the snapshot is gone. Other images over the snapshot are destroyed by that. If the command
    /// is interrupted, merging goes on, and the same command finishes it.
    Commit {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// The snapshot, the backing file of the image
        file: PathBuf,
    },
    /// End merging that a commit has begun; the image stays over its snapshot
    ///
    /// What was written into the snapshot so far is in it: it is no picture of the moment any more.
    Cancel {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
    },
    /// Write what the disk holds now into a file of its own, by a snapshot that is merged again
    Backup {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// The backup, a new file
        file: PathBuf,
        /// Format of the backup
        #[arg(long, value_enum, default_value = "qcow2")]
        format: BackupFormat,
    },
    /// List the image and the files that it lies over
    List {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// Print JSON, as qemu-img info does
        #[arg(long)]
        json: bool,
    },
}

/// What a backup can be.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum BackupFormat {
    /// Compact
    Qcow2,
    /// The disk's bytes, with holes
    Raw,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one or more disks until told to stop
    Serve(Box<Serve>),
    /// List the exports that are served
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one export with its counters
    Stat {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print again every second, with rates, until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Tell what happens to exports, as it happens, until interrupted
    ///
    /// Clients that come, leave or are refused, disks that are upgraded or get another size, requests that the
    /// storage failed, exports that start, are recovered or end.
    Events {
        /// The export [default: all]
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        export: Option<String>,
        /// The server, by name [default: all that run]
        #[arg(long, value_name = "NAME")]
        server: Option<String>,
        /// Print JSON, an object for each line (ublkup-admin(7))
        #[arg(long)]
        json: bool,
    },
    /// Show what all exports do, every second, until interrupted: rates, latencies, and who has which disk
    ///
    /// Reads and writes are those that were completed in the last second. Half of them took no longer than P50, and 99 of 100
    /// no longer than P99. IN FLIGHT: requests that were taken and have no answer yet; HELD/s: requests that limits have
    /// delayed. A dash is a value that is not there yet.
    Top,
    /// Print the measurements of all exports in the text format of Prometheus
    ///
    /// For the textfile collector of the node exporter: `ublkup metrics >ublkup.prom.new && mv ublkup.prom.new
    /// ublkup.prom`. `serve --metrics` lets Prometheus collect them itself.
    Metrics,
    /// Give an export another size while it is served; both doors tell their clients
    ///
    /// Without SIZE the export gets the size that its file or device has now. A file that is smaller than SIZE is
    /// made larger. To make the disk smaller, and a file with it, takes --shrink, a block device that is not in
    /// use, and no vhost-user client.
    Resize {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// The size, like 20G
        #[arg(value_parser = crate::request::parse_size)]
        size: Option<u64>,
        /// Cut off what is behind the new size
        #[arg(long)]
        shrink: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make snapshots of a qcow2 image while it is served, merge them again, and make backups
    ///
    /// For exports of `qcow2:`. The export keeps the path of its image: a snapshot is what the disk held, in a file of
    /// another name, and the image is a new one over it, with what is written from then on.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Change options of an export while it is served
    ///
    /// The limits (iops-total, bps-read, …, burst-ms), poll-us and reconnect-grace can be changed; recover and the commands that
    /// follow know what was changed. log=LEVEL changes the log of the export's server, until that ends.
    Set {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// What to change
        #[arg(value_name = "KEY=VALUE", required = true, value_parser = key_value)]
        options: Vec<(String, String)>,
    },
    /// Add exports to a server that runs
    ///
    /// An export that was added lasts until it is stopped. A server of the same --server-name serves it again after a
    /// restart or a crash, and recover serves it alone. SPECs and options are those of serve. Exports of a configuration
    /// file are added by reload.
    Add(Box<Add>),
    /// Make a server that runs serve what its configuration file says now
    ///
    /// New exports are added, those that the file no longer has are stopped, unless they are in use, and options are
    /// changed that set can change. What takes a restart is told, and then the exit code is 1. Exports of the command
    /// line and those of add are left alone.
    Reload {
        /// The server, by name [default: the only one that runs]
        #[arg(add = ArgValueCandidates::new(server_names))]
        server: Option<String>,
        /// Only tell what would be done
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Drain an export and stop serving it; refused while it is in use
    #[command(visible_alias = "remove")]
    Stop {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// Stop also while the block device is open or a vhost-user client has the disk. If its server has died,
        /// remove the block device that waits for the next one, and the notes
        #[arg(long)]
        force: bool,
    },
    /// Serve an export again as it was last served, with the block device and the clients that its server left when
    /// it died
    ///
    /// What is the server's own is not kept: --metrics, --server-name, --room, --log. 'ublkup serve' with the same exports keeps
    /// it, and recovers them as well.
    Recover {
        /// The export
        #[arg(value_parser = export_name, add = ArgValueCandidates::new(export_names))]
        name: String,
        /// What is done about its server
        #[command(flatten)]
        predecessor: PredecessorOptions,
        /// Whether the server confines itself.
        #[command(flatten)]
        sandbox: SandboxOption,
    },
    /// Tell whether a block device can be upgraded to vhost-user, and how
    ///
    /// Exit code 0: it can; 3: it cannot, and why. The device is claimed (O_EXCL) for the moment between an open and
    /// a close, in which another mount or claim gets EBUSY, and nothing is written. The server sees a client that
    /// connects and disconnects; only a client that starts a vring gets the disk.
    Probe {
        /// The block device
        device: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run QEMU with disks that go straight to the servers behind their block devices
    #[command(
        override_usage = "ublkup qemu [OPTIONS] DEVICE[,key=value…]... -- QEMU [ARGUMENT]...\n       \
                          ublkup qemu --live QMP-SOCKET DEVICE --unmounted [--back]"
    )]
    Qemu(Qemu),
    /// Tell what this machine can and cannot do, and find what servers that died left behind
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Remove what servers that died left behind: their block devices, also those that wait for the next
        /// server, and their folders
        #[arg(long)]
        clean: bool,
        /// Remove a ublk device that waits for a server or is dead, whatever program made it; asks first
        #[arg(long, value_name = "DEVICE", value_parser = ublk_device, conflicts_with_all = ["clean", "json"])]
        remove: Option<u32>,
        /// Do not ask
        #[arg(long, requires = "remove")]
        yes: bool,
    },
    /// Run qemu-storage-daemon for a server, until that ends
    #[command(hide = true)]
    QemuKeeper {
        /// Folder of the export
        folder: PathBuf,
        /// Arguments of qemu-storage-daemon
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Print user and group of the ordinary user that made a ublk device, for udev rules; fails for devices of
    /// administrators
    #[command(hide = true)]
    DeviceOwner {
        /// The kernel's name of the device
        kernel_name: String,
    },
    /// Print the name of the export that a ublk device of this machine's root belongs to, for udev rules
    #[command(hide = true)]
    DeviceName {
        /// The kernel's name of the device
        kernel_name: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages into a folder
    Man {
        /// The folder
        folder: PathBuf,
    },
}

/// `qemu`
#[derive(Debug, Args)]
pub struct Qemu {
    /// A block device for the guest; the keys are properties of QEMU's -device, like id=root, bootindex=1,
    /// num-queues=2. With --live: the id of the guest's disk, its block node, or the path of the block device
    #[arg(value_name = "DEVICE", required = true)]
    pub devices: Vec<String>,

    /// Print the shell command instead of running it
    #[arg(long, conflicts_with = "live")]
    pub print: bool,

    /// Fail with 3 when a device has no service [default: use the block device]
    #[arg(long, conflicts_with = "live")]
    pub require_upgrade: bool,

    /// Move a disk of the running guest with this monitor
    #[arg(long, value_name = "QMP-SOCKET", conflicts_with = "command")]
    pub live: Option<PathBuf>,

    /// The guest has unmounted the disk and does not use it. --live needs your word for that: from outside it cannot
    /// be seen, and a file system that is mounted is lost with the old device
    #[arg(long, requires = "live")]
    pub unmounted: bool,

    /// With --live: move a disk that was moved by --live back to the block device
    #[arg(long, requires = "live")]
    pub back: bool,

    /// With --live: how long the disk must have been without a request. The default is longer than Linux keeps a
    /// dirty page (30 s and 5 s, vm.dirty_expire_centisecs and vm.dirty_writeback_centisecs)
    #[arg(long, value_name = "SECONDS", default_value_t = 40, requires = "live")]
    pub quiet: u16,

    /// QEMU and its arguments; the launcher adds the disks, and shared memory if there is none
    #[arg(last = true, value_name = "QEMU", required_unless_present = "live")]
    pub command: Vec<OsString>,
}

fn key_value(text: &str) -> Result<(String, String), &'static str> {
    let (key, value) = text.split_once('=').ok_or("give KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// The number in the name of a ublk device.
fn ublk_device(text: &str) -> Result<u32, &'static str> {
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    let number = ["ublkb", "ublkc"]
        .iter()
        .find_map(|kind| name.strip_prefix(kind));
    (number.and_then(|number| number.parse().ok())).ok_or("give /dev/ublkbN")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_log_level_that_does_not_exist_is_refused() {
        for good in ["info", "WARN", "off", "info,ublkup::door=debug"] {
            assert_eq!(log::check_filter(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "warning",
            "verbose",
            "info,",
            "ublkup::door",
            "ublkup=all",
        ] {
            assert!(
                log::check_filter(bad)
                    .unwrap_err()
                    .contains("error, warn, info"),
                "{bad}"
            );
        }
    }
}
