//! kublk's command line, and what of it this server can be told.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

/// What kublk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Make a device and serve it in the background.
    Add,
    /// Serve a device whose server is gone, in the background.
    Recover,
    /// Remove a device.
    Delete,
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

/// What is behind a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing.
    Null,
    /// A file.
    Loop(PathBuf),
    /// Striped files. Striping is kublk's; one of the files stands for all.
    Stripe(Vec<PathBuf>),
    /// Nothing, after a while.
    Slow {
        /// The while.
        delay_us: u64,
    },
}

/// How the data travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    /// The driver copies it.
    Copy,
    /// Nobody copies it: `-z` and `--auto_zc` are two ways to one end.
    ZeroCopy,
    /// The server copies it.
    UserCopy,
}

/// What becomes of a device whose server dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// It is dead, too.
    No,
    /// It waits; what was under way fails.
    Plain,
    /// It waits, and so does what was under way.
    Reissue,
    /// It waits, and requests fail meanwhile.
    FailIo,
}

/// A command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub command: Command,
    /// `-n`
    pub id: Option<u32>,
    /// `-q`
    pub queues: u16,
    /// `-d`
    pub depth: u16,
    /// `-t` and what belongs to it.
    pub target: Option<Target>,
    /// `-z`, `--auto_zc`, `-u`
    pub data: Data,
    /// `-r`, `-i`, `-e`
    pub recovery: Recovery,
    /// `-b`
    pub batch: bool,
    /// `--no_auto_part_scan`
    pub no_scan: bool,
    /// `--safe`
    pub safe: bool,
    /// `-s`
    pub size_bytes: u64,
}

/// Matters between a server and the driver that change nothing for the disk's users. They are left
/// out: tests that are about them are not applicable, and others only mention them.
const LEFT_OUT: [&str; 7] = [
    "-g",
    "--get_data",
    "--auto_zc_fallback",
    "--no_ublk_fixed_fd",
    "--per_io_tasks",
    "--quiet",
    "--all",
];

/// The same, with a value.
const LEFT_OUT_WITH_VALUE: [&str; 2] = ["--nthreads", "--debug_mask"];

impl Options {
    /// Reads what follows the program's name.
    ///
    /// # Errors
    /// It asks for something that this server does not do, or makes no sense.
    pub fn parse(words: &[String]) -> Result<Self> {
        let (first, rest) = words.split_first().context("no command")?;
        let command = match first.as_str() {
            "add" => Command::Add,
            "recover" => Command::Recover,
            "del" => Command::Delete,
            "stop" => Command::Stop,
            "list" => Command::List,
            "features" => Command::Features,
            "update_size" => Command::UpdateSize,
            "quiesce" => Command::Quiesce,
            other => bail!("ublkup has nothing like kublk's {other}"),
        };
        let mut options = Options {
            command,
            id: None,
            queues: 2,
            depth: 128,
            target: None,
            data: Data::Copy,
            recovery: Recovery::No,
            batch: false,
            no_scan: false,
            safe: false,
            size_bytes: 0,
        };
        let (mut kind, mut delay_us, mut files) = (None, 0, Vec::new());
        let mut words = rest.iter().map(String::as_str);
        while let Some(word) = words.next() {
            let mut value = || words.next().with_context(|| format!("{word} has no value"));
            match word {
                "-t" | "--type" => kind = Some(value()?),
                "-n" | "--number" => options.id = Some(value()?.parse()?),
                "-q" | "--queues" => options.queues = value()?.parse()?,
                "-d" | "--depth" => options.depth = value()?.parse()?,
                "-s" | "--size" => options.size_bytes = value()?.parse()?,
                "-r" | "--recovery" if value()? != "0" => {
                    options.recovery = options.recovery.or(Recovery::Plain);
                }
                "-i" | "--recovery_reissue" if value()? != "0" => {
                    options.recovery = Recovery::Reissue;
                }
                "-e" | "--recovery_fail_io" if value()? != "0" => {
                    options.recovery = Recovery::FailIo;
                }
                // With the value 0, which was taken above.
                "-r" | "-i" | "-e" => {}
                "-z" | "--zero_copy" | "--auto_zc" => options.data = Data::ZeroCopy,
                "-u" | "--user_copy" => options.data = Data::UserCopy,
                "-b" | "--batch" => options.batch = true,
                "-a" => {}
                "--safe" => options.safe = true,
                "--no_auto_part_scan" => options.no_scan = true,
                "--delay_us" => delay_us = value()?.parse()?,
                word if LEFT_OUT.contains(&word) => {}
                word if LEFT_OUT_WITH_VALUE.contains(&word) => drop(value()?),
                word if word.starts_with('-') => bail!("ublkup has nothing like kublk's {word}"),
                file => files.push(PathBuf::from(file)),
            }
        }
        options.target = match (kind, files) {
            (None, _) => None,
            (Some("null"), _) => Some(Target::Null),
            (Some("fault_inject"), _) => Some(Target::Slow { delay_us }),
            (Some("loop"), files) => {
                let file = files.into_iter().next().context("loop needs a file")?;
                Some(Target::Loop(file))
            }
            (Some("stripe"), files) if !files.is_empty() => Some(Target::Stripe(files)),
            (Some(kind), _) => bail!("ublkup has nothing like kublk's -t {kind}"),
        };
        Ok(options)
    }
}

impl Recovery {
    /// The stronger wish stays, whatever the order.
    fn or(self, other: Recovery) -> Recovery {
        match self {
            Recovery::No => other,
            said => said,
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
        assert_eq!(got.target, Some(Target::Loop("/tmp/a".into())));
        assert_eq!((got.queues, got.data), (4, Data::ZeroCopy));
        let got = parse("add -t fault_inject -q 2 -d 1 --delay_us 2000000").expect("a line");
        assert_eq!(
            got.target,
            Some(Target::Slow {
                delay_us: 2_000_000
            })
        );
        assert_eq!((got.depth, got.recovery), (1, Recovery::No));
        for (line, expected) in [
            ("recover -n 3 -t null -r 1 -i 1", Recovery::Reissue),
            ("recover -n 3 -t null -i 1 -r 1", Recovery::Reissue),
            ("recover -n 3 -t null -r 1 -i 0", Recovery::Plain),
            ("recover -n 3 -t null -r 0 -e 1", Recovery::FailIo),
            ("recover -n 3 -t null -r 0", Recovery::No),
        ] {
            assert_eq!(parse(line).expect(line).recovery, expected, "{line}");
        }
        let got = parse("update_size -n 7 -s 4096").expect("a line");
        assert_eq!((got.id, got.size_bytes), (Some(7), 4096));
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
