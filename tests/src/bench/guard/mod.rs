//! What one request costs the server of this tree, against the last landed one: instructions, system calls, sleeps and
//! allocations, counted and never timed. A request that costs more than before is a failure.

pub mod cost;
pub mod landed;
mod rounds;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, bail, ensure};

use self::cost::{Cost, LOADS, Load, Storage};
use self::landed::{Conditions, Costs, Line, Standing};
use super::{Arguments, Lane, table};
use crate::report::line;

/// The lane's name.
pub const LANE: &str = "guard";

/// Runs the lane, which stands alone: it has no document.
pub fn run(repo: &Path, arguments: &Arguments) -> Result<ExitCode> {
    ensure!(
        arguments.lanes == [Lane::Guard],
        "guard runs alone: it compares costs, and the other lanes measure times"
    );
    ensure!(
        !arguments.update
            || (arguments.compare.is_empty()
                && arguments.only.is_none()
                && arguments.server.is_none()),
        "--update writes the costs of all loads of this checkout: without --compare, --only and --server"
    );
    let loads: Vec<Load> = LOADS
        .into_iter()
        .filter(|load| {
            let only = arguments.only.as_ref();
            only.is_none_or(|only| only.is_match(&format!("{LANE}: {load}")))
        })
        .collect();
    ensure!(!loads.is_empty(), "nothing was counted: no load matches");
    let servers = super::servers(repo, arguments)?;
    let mut counted = Vec::new();
    for (name, server) in &servers {
        eprintln!("lab: counting for {name}");
        counted.push(count(server, &loads)?);
    }
    let now = counted.pop().context("there is no server")?;
    if arguments.update {
        ensure!(
            now.cost.values().all(Cost::is_whole),
            "not everything can be counted on this machine: {} stays as it is",
            landed::FILE
        );
        now.write(repo)?;
        line(&format!("the costs of this tree are in {}", landed::FILE));
        return Ok(ExitCode::SUCCESS);
    }
    let before = match counted.pop() {
        Some(before) => before,
        None => Costs::of(repo)?,
    };
    let lines = landed::compare(&loads, &before, &now);
    lines.iter().for_each(|one| line(&words(one)));
    line("not counted: the block door, which takes a ublk driver");
    let worse = worse(&lines);
    if worse.is_empty() {
        line(&format!(
            "no request costs more than before ({} figures)",
            lines.len()
        ));
        return Ok(ExitCode::SUCCESS);
    }
    line(&format!(
        "{} of {} figures are worse",
        worse.len(),
        lines.len()
    ));
    Ok(ExitCode::FAILURE)
}

/// The costs of a server.
pub fn count(server: &Path, loads: &[Load]) -> Result<Costs> {
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let image = Image::new()?;
    let mut costs = Costs {
        counted: Conditions::here()?,
        cost: std::collections::BTreeMap::new(),
    };
    for load in loads {
        let spec = match load.storage {
            Storage::Null => format!("null:{IMAGE_BYTES}"),
            Storage::File => format!("file:{},cache=buffered", image.path().display()),
        };
        let cost =
            cost::of(server, &spec, *load, scratch.path()).with_context(|| load.to_string())?;
        costs.cost.insert(load.to_string(), cost);
    }
    Ok(costs)
}

/// The figures that are worse for a server that makes each request cost more than it should, by fault injection.
pub fn check_is_noticed(server: &Path) -> Result<Vec<String>> {
    let load = LOADS[0];
    let scratch = tempfile::tempdir().context("cannot make a temporary directory")?;
    let of = |spec: String| -> Result<Costs> {
        let cost = cost::of(server, &spec, load, scratch.path())?;
        Ok(Costs {
            counted: Conditions::here()?,
            cost: [(load.to_string(), cost)].into(),
        })
    };
    let plain = of(format!("fault:flush=spend;null:{IMAGE_BYTES}"))?;
    let again = of(format!("fault:flush=spend;null:{IMAGE_BYTES}"))?;
    let noise = worse(&landed::compare(&[load], &plain, &again));
    ensure!(noise.is_empty(), "the same server: {noise:?}");
    let mut all = Vec::new();
    for fault in ["spend", "delay1"] {
        let costly = of(format!("fault:read={fault};null:{IMAGE_BYTES}"))?;
        let lines = landed::compare(&[load], &plain, &costly);
        let worse = lines.iter().filter(|one| one.standing == Standing::Worse);
        all.extend(worse.map(|one| format!("{fault}: {}", one.what)));
    }
    Ok(all)
}

/// Compares a server with the last landed tree; an error tells what is worse.
pub fn check(repo: &Path, server: &Path) -> Result<()> {
    let (before, now) = (Costs::of(repo)?, count(server, &LOADS)?);
    let lines = landed::compare(&LOADS, &before, &now);
    lines.iter().for_each(|one| line(&words(one)));
    let worse = worse(&lines);
    if !worse.is_empty() {
        bail!(
            "a request costs more than on the last landed tree:\n{}\nfind out why; if it is meant, say why in the \
             commit that contains what `cargo lab bench guard --update` writes",
            worse.join("\n")
        );
    }
    let compared = |one: &&Line| !matches!(one.standing, Standing::NotCompared(_));
    ensure!(
        lines.iter().filter(compared).count() > 0,
        "nothing could be compared"
    );
    Ok(())
}

fn worse(lines: &[Line]) -> Vec<String> {
    let worse = lines.iter().filter(|one| one.standing == Standing::Worse);
    worse.map(words).collect()
}

/// A figure in one line.
fn words(one: &Line) -> String {
    let number = |figure: Option<f64>| figure.map_or("none".to_owned(), table::small);
    let standing = match one.standing {
        Standing::Same => "same".to_owned(),
        Standing::Better => "better".to_owned(),
        Standing::Worse => "WORSE".to_owned(),
        Standing::NotCompared(why) => format!("not compared: {why}"),
    };
    format!(
        "{}: {} for a request: {}, before {}: {standing}",
        one.load,
        one.what,
        number(one.now),
        number(one.before)
    )
}

/// How big the disks are.
const IMAGE_BYTES: u64 = 1 << 20;

/// A file full of data on tmpfs, so that no request waits for a disk.
struct Image(tempfile::NamedTempFile);

impl Image {
    fn new() -> Result<Self> {
        let file = tempfile::Builder::new()
            .prefix("ublkup-guard-")
            .tempfile_in("/dev/shm");
        let mut file = file.context("cannot make a file on tmpfs (/dev/shm)")?;
        let data = vec![0x5a; usize::try_from(IMAGE_BYTES)?];
        file.write_all(&data)
            .context("cannot fill a file on tmpfs")?;
        Ok(Self(file))
    }

    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}
