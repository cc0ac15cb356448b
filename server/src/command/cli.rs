//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, Args, Parser, Subcommand};

use crate::config::{ConfigError, DoorMode, ExportConfig, ExportOptions, Spec};
use crate::config::{check_together, read_file};
use crate::door::ublk::{DataPath, Recovery};
use crate::engine::cpus::Cpus;
use crate::engine::polling::Polling;

/// Serves disks as /dev/ublkbN block devices and as vhost-user-blk sockets, from one backend.
#[derive(Debug, Parser)]
#[command(
    name = "ublkup",
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 not upgradable.\n\
                  Messages go to standard error, data to standard output."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// Where servers keep their sockets and locks [default: /run/ublkup for root, else
    /// $XDG_RUNTIME_DIR/ublkup]
    #[arg(long, global = true, value_name = "DIR", env = "UBLKUP_RUNTIME_DIR")]
    pub runtime_dir: Option<PathBuf>,

    /// What to log: error, warn, info, debug, trace, or a filter like ublkup::door=debug
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "UBLKUP_LOG",
        default_value = "info"
    )]
    pub log: String,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve one or more disks until told to stop
    Serve(Serve),
    /// List the exports that are served
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one export with its counters
    Stat {
        /// The export
        name: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Print again every second, until interrupted
        #[arg(long)]
        watch: bool,
    },
    /// Give an export another size while it is served; both doors tell their clients
    ///
    /// Without SIZE it gets the size that its file or device has now. A file that is smaller than SIZE is
    /// made larger. To cut something off takes --shrink, a block device that nobody uses, and no
    /// vhost-user client; a file is cut then too.
    Resize {
        /// The export
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
    /// Drain an export and take it down; refused while somebody uses it
    Stop {
        /// The export
        name: String,
        /// Also while its block device is open or a vhost-user client has the disk
        #[arg(long)]
        force: bool,
    },
    /// Serve an export again as it was last served, and go on with the block device and the clients
    /// that its server left when it died
    Recover {
        /// The export
        name: String,
        /// If its server lives, take over from it
        #[arg(long)]
        take_over: bool,
    },
    /// Say whether a block device can be upgraded, and how; disturbs nobody
    ///
    /// Exit code 0: it can; 3: it cannot, and why. The device is claimed (O_EXCL) for the moment between an open
    /// and a close, in which somebody else's mount or claim gets EBUSY, and nothing is written. The
    /// server sees a client that comes and goes; only one that starts a ring gets the disk.
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
                          ublkup qemu --live QMP-SOCKET DEVICE"
    )]
    Qemu(Qemu),
    /// Say what this machine can and cannot do, and find what dead servers left
    Doctor {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Remove what dead servers left: their block devices and folders
        #[arg(long)]
        clean: bool,
    },
    /// Print user and group of the ordinary user who made a ublk device, for udev rules; fails for
    /// devices of others
    #[command(hide = true)]
    DeviceOwner {
        /// What the kernel calls it
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

/// `serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// [NAME=]KIND:ARG[,key=value…]; KIND:ARG is null:SIZE, mem:SIZE or file:PATH; keys are
    /// serial=TEXT, block-size=BYTES, read-only, and for files cache=auto|direct|buffered
    #[arg(value_name = "SPEC", required_unless_present = "config")]
    pub specs: Vec<String>,

    /// Name of the export, if there is one SPEC [default: from the SPEC]
    #[arg(long)]
    pub name: Option<String>,

    /// The block door, /dev/ublkbN [default: auto]
    #[arg(long, value_enum)]
    pub ublk: Option<DoorMode>,

    /// N of /dev/ublkbN, if there is one SPEC [default: the kernel's choice]
    #[arg(long, value_name = "N")]
    pub ublk_id: Option<u32>,

    /// How the block door's data gets to the backend and back: without a copy where the kernel can and
    /// it saves work, or as told [default: auto]
    #[arg(long, value_enum)]
    pub ublk_data: Option<DataPath>,

    /// Each queue thread of the block door runs only on the processors whose requests its queue gets,
    /// as the kernel deals them out [default: yes with several queues, unless --cpus is given or this
    /// process may not use all processors]
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true,
        default_missing_value = "yes", action = ArgAction::Set, hide_possible_values = true,
        value_parser = BoolishValueParser::new())]
    pub ublk_affinity: Option<bool>,

    /// The kernel does not look for partitions on the block device (Linux 7.0)
    #[arg(long)]
    pub no_partition_scan: bool,

    /// What becomes of the block device when this server dies: it waits for the next one, and
    /// requests without an answer are done again (reissue); it stays, and requests fail until there
    /// is a server (fail-io); it goes (off) [default: auto: reissue for files, off for the others]
    #[arg(long, value_enum)]
    pub ublk_recovery: Option<Recovery>,

    /// The vhost-user-blk door [default: auto]
    #[arg(long, value_enum)]
    pub vhost: Option<DoorMode>,

    /// Where the vhost door listens, if there is one SPEC [default: in the runtime directory]
    #[arg(long, value_name = "PATH")]
    pub vhost_socket: Option<PathBuf>,

    /// Queues of each door [default: the processors, at most 4]
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,

    /// Threads that serve the queues of a vhost client, in turns; each queue of the block door has one
    /// of its own [default: one for each queue]
    #[arg(long, value_name = "N")]
    pub vhost_threads: Option<u16>,

    /// Pin the memory of vhost clients, for files around the page cache: less work for each request.
    /// Not for guests with a balloon, free page reporting or virtio-mem, whose data it would damage
    #[arg(long)]
    pub vhost_pin_memory: bool,

    /// Guests may move by live migration: a second client may connect, and takes the disk over when the
    /// first has stopped for it. With --ublk no the file is claimed only while a guest has it, so that
    /// the guest may also move to another server, which needs --migration too
    #[arg(long)]
    pub migration: bool,

    /// Requests under way per ublk queue [default: 128]
    #[arg(long, value_name = "N")]
    pub depth: Option<u16>,

    /// How long an idle queue thread looks for work before it sleeps, where that has paid off lately,
    /// in microseconds; 0: not at all; always: it never sleeps and keeps a processor to itself
    /// [default: 100]
    #[arg(long, value_name = "N|always")]
    pub poll_us: Option<Polling>,

    /// Processors for the queue threads of each door, like 2,4-7: one each, from the first again
    /// when there are more threads [default: wherever there is room]
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<Cpus>,

    /// Seconds for which the disk is kept for a vhost client that died, before the block device is
    /// writable again [default: 10]
    #[arg(long, value_name = "SECONDS")]
    pub reconnect_grace: Option<u32>,

    /// Refuse writes at both doors
    #[arg(long)]
    pub read_only: bool,

    /// If a living server has an export of this name, take over its block device and its clients: it
    /// finishes what is under way and leaves, and nobody gets an error
    #[arg(long)]
    pub take_over: bool,

    /// Serve what can be served when some of several exports cannot start
    #[arg(long)]
    pub keep_going: bool,

    /// A TOML file with `[[export]]` tables; may be given along with SPECs
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// `qemu`
#[derive(Debug, Args)]
pub struct Qemu {
    /// A block device for the guest; the keys are properties of QEMU's -device, like id=root,
    /// bootindex=1, num-queues=2. With --live: the id of the guest's disk, its block node, or the
    /// path of the block device
    #[arg(value_name = "DEVICE", required = true)]
    pub devices: Vec<String>,

    /// Print the shell command instead of running it
    #[arg(long, conflicts_with = "live")]
    pub print: bool,

    /// Fail with 3 when a device has no service, instead of using the block device
    #[arg(long, conflicts_with = "live")]
    pub require_upgrade: bool,

    /// Move a disk of the running guest whose monitor is here; the guest must have unmounted it
    #[arg(long, value_name = "QMP-SOCKET", conflicts_with = "command")]
    pub live: Option<PathBuf>,

    /// QEMU and its arguments; the launcher adds the disks, and shared memory if there is none
    #[arg(last = true, value_name = "QEMU", required_unless_present = "live")]
    pub command: Vec<OsString>,
}

impl Serve {
    /// The exports that were asked for, validated alone and together.
    ///
    /// # Errors
    ///
    /// When something cannot be served as asked.
    pub fn exports(&self) -> Result<Vec<ExportConfig>, ConfigError> {
        let options = ExportOptions {
            name: self.name.clone(),
            read_only: self.read_only.then_some(true),
            ublk: self.ublk,
            ublk_id: self.ublk_id,
            ublk_data: self.ublk_data,
            ublk_affinity: self.ublk_affinity,
            no_partition_scan: self.no_partition_scan.then_some(true),
            ublk_recovery: self.ublk_recovery,
            vhost: self.vhost,
            vhost_socket: self.vhost_socket.clone(),
            queues: self.queues,
            vhost_threads: self.vhost_threads,
            migration: self.migration.then_some(true),
            vhost_pin_memory: self.vhost_pin_memory.then_some(true),
            depth: self.depth,
            poll_us: self.poll_us,
            cpus: self.cpus.clone(),
            reconnect_grace: self.reconnect_grace,
        };
        let alone = self.specs.len() == 1 && self.config.is_none();
        if !alone {
            for (flag, given) in [
                ("--name", self.name.is_some()),
                ("--ublk-id", self.ublk_id.is_some()),
                ("--vhost-socket", self.vhost_socket.is_some()),
            ] {
                if given {
                    return Err(ConfigError(format!(
                        "{flag} is for one export, and there are several: \
                         name them with NAME=SPEC, or say it per export in a --config file"
                    )));
                }
            }
        }
        let mut exports = Vec::new();
        for spec in &self.specs {
            exports.push(options.clone().export(spec.parse::<Spec>()?)?);
        }
        if let Some(path) = &self.config {
            exports.extend(read_file(path, &options)?);
        }
        check_together(&exports)?;
        Ok(exports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    fn exports(args: &[&str]) -> Result<Vec<ExportConfig>, String> {
        let args = ["ublkup", "serve"].iter().chain(args);
        let cli = Cli::try_parse_from(args).map_err(|error| error.to_string())?;
        let Command::Serve(serve) = cli.command else {
            unreachable!("parsed 'serve'")
        };
        serve.exports().map_err(|error| error.to_string())
    }

    #[test]
    fn several_specs_share_the_options_that_can_be_shared() {
        let got = exports(&["--read-only", "--queues", "2", "a=mem:1G", "b=null:2G"]).unwrap();
        assert!(
            got.iter()
                .all(|export| export.read_only && export.queues == 2)
        );
        assert!(exports(&["--name", "x", "a=mem:1G", "b=mem:1G"]).is_err());
        assert!(
            exports(&["mem:1G", "mem:1G"])
                .unwrap_err()
                .contains("two exports")
        );
        assert!(exports(&[]).is_err());
    }
}
