//! kublk's command line, and what of it this server can be told.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};

/// What kublk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Command {
    /// Make a device and serve it in the background.
    Add,
    /// Serve a device whose server is gone, in the background.
    Recover,
    /// Remove a device.
    Del,
    /// Stop a device.
    Stop,
    /// Say what the driver knows of a device.
    List,
    /// Name the features.
    Features,
    /// Another size.
    UpdateSize,
    /// Take the server off a device, which then waits for another one.
    Quiesce,
}

/// `-t`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Type {
    /// No storage.
    Null,
    /// A file.
    Loop,
    /// Striped files. Striping is kublk's; one of the files stands for all.
    Stripe,
    /// No storage, and a delay.
    FaultInject,
}

/// How the data travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// The driver copies it.
    Copy,
    /// Without a copy: `-z` and `--auto_zc` are two ways to one end.
    ZeroCopy,
    /// The server copies it.
    UserCopy,
}

/// What becomes of a device whose server dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It is dead, too.
    No,
    /// It waits; requests that were in flight fail.
    Plain,
    /// It waits, and so do requests that were in flight.
    Reissue,
    /// It waits, and requests fail meanwhile.
    FailIo,
}

/// A command line. Options between the server and the driver that change nothing for the disk's users
/// are accepted and have no effect: tests that are about them are not applicable, and others only
/// mention them.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "kublk",
    no_binary_name = true,
    args_override_self = true,
    disable_help_flag = true
)]
pub struct Options {
    /// What to do.
    pub command: Command,
    /// Of `-t loop` and `-t stripe`.
    pub files: Vec<PathBuf>,
    #[arg(short = 't', long = "type")]
    pub kind: Option<Type>,
    #[arg(short = 'n', long = "number")]
    id: Option<u32>,
    #[arg(short, long, default_value_t = 2)]
    pub queues: u16,
    #[arg(short, long, default_value_t = 128)]
    pub depth: u16,
    #[arg(short, long = "size", default_value_t = 0)]
    pub size_bytes: u64,
    #[arg(long = "delay_us", default_value_t = 0)]
    pub delay_us: u64,
    #[arg(short, long, default_value_t = 0)]
    recovery: u8,
    #[arg(short = 'i', long = "recovery_reissue", default_value_t = 0)]
    recovery_reissue: u8,
    #[arg(short = 'e', long = "recovery_fail_io", default_value_t = 0)]
    recovery_fail_io: u8,
    #[arg(short = 'z', long = "zero_copy", alias = "auto_zc")]
    zero_copy: bool,
    #[arg(short, long = "user_copy")]
    user_copy: bool,
    #[arg(long = "no_auto_part_scan")]
    pub no_scan: bool,
    #[arg(long)]
    pub safe: bool,
    #[arg(short)]
    all_devices: bool,
    #[arg(short, long)]
    batch: bool,
    #[arg(short, long = "get_data")]
    get_data: bool,
    #[arg(long = "auto_zc_fallback")]
    auto_zc_fallback: bool,
    #[arg(long = "no_ublk_fixed_fd")]
    no_ublk_fixed_fd: bool,
    #[arg(long = "per_io_tasks")]
    per_io_tasks: bool,
    #[arg(long)]
    quiet: bool,
    #[arg(long)]
    all: bool,
    #[arg(long)]
    nthreads: Option<String>,
    #[arg(long = "debug_mask")]
    debug_mask: Option<String>,
}

impl Options {
    /// Reads what follows the program's name.
    pub fn parse(words: &[String]) -> Result<Self> {
        let options =
            Self::try_parse_from(words).context("ublkup has nothing like this of kublk's")?;
        let needs_file = matches!(options.kind, Some(Type::Loop | Type::Stripe));
        if needs_file && options.files.is_empty() {
            bail!("this type needs a file");
        }
        Ok(options)
    }

    /// The device it is about.
    pub fn device(&self) -> Result<u32> {
        self.id.context("which device? (-n)")
    }

    /// The number that the new device is to have.
    pub fn wanted_id(&self) -> Option<u32> {
        self.id
    }

    /// `-z`, `--auto_zc`, `-u`
    pub fn data(&self) -> Data {
        match (self.zero_copy, self.user_copy) {
            (true, _) => Data::ZeroCopy,
            (_, true) => Data::UserCopy,
            _ => Data::Copy,
        }
    }

    /// `-r`, `-i`, `-e`: the strongest counts.
    pub fn recovery(&self) -> Recovery {
        match (self.recovery, self.recovery_reissue, self.recovery_fail_io) {
            (_, _, 1..) => Recovery::FailIo,
            (_, 1.., _) => Recovery::Reissue,
            (1.., _, _) => Recovery::Plain,
            _ => Recovery::No,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options> {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        Options::parse(&words)
    }

    #[test]
    fn the_lines_of_the_kernels_tests_are_understood() {
        let got = parse("add -t loop -q 4 -z --no_ublk_fixed_fd /tmp/a").expect("a line");
        assert_eq!(
            (got.kind, &got.files[..]),
            (Some(Type::Loop), &["/tmp/a".into()][..])
        );
        assert_eq!((got.queues, got.data()), (4, Data::ZeroCopy));
        let got = parse("add -t fault_inject -q 2 -d 1 --delay_us 2000000").expect("a line");
        assert_eq!(
            (got.kind, got.delay_us),
            (Some(Type::FaultInject), 2_000_000)
        );
        assert_eq!((got.depth, got.recovery()), (1, Recovery::No));
        for (line, expected) in [
            ("recover -n 3 -t null -r 1 -i 1", Recovery::Reissue),
            ("recover -n 3 -t null -i 1 -r 1", Recovery::Reissue),
            ("recover -n 3 -t null -r 1 -i 0", Recovery::Plain),
            ("recover -n 3 -t null -r 0 -e 1", Recovery::FailIo),
            ("recover -n 3 -t null -r 0", Recovery::No),
        ] {
            assert_eq!(parse(line).expect(line).recovery(), expected, "{line}");
        }
        let got = parse("update_size -n 7 -s 4096").expect("a line");
        assert_eq!((got.device().ok(), got.size_bytes), (Some(7), 4096));
        for line in [
            "add -t null -g --auto_zc --auto_zc_fallback --nthreads 4 --per_io_tasks --debug_mask 0x7",
            "del -a",
            "list --all",
            "add --quiet -b -u --type null",
        ] {
            parse(line).expect(line);
        }
    }

    #[test]
    fn what_ublkup_does_not_do_is_refused() {
        for line in [
            "set_params -q 1",
            "add -t null --io_desc_size 64",
            "add -t null --metadata_size 8",
            "recover -n 1 -t fault_inject --die_during_fetch 1",
            "add -t cloud",
            "add -t loop",
            "add -q",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
