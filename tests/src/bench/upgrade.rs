//! The same job in the same guest before and after the upgrade, in one User Mode Linux; see
//! [`upgraded`], whose story also checks that the data is right.

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::Settings;
use super::figures::Samples;
use super::record::{Candidate, Row};
use crate::cargo::Build;
use crate::kernel::Kernel;
use crate::runner;
use crate::suites::Need;
use crate::suites::upgraded::{self, GUEST, GUEST_UPGRADED, Load, PROGRAM, PROGRAM_UPGRADED};
use crate::test::{Context, Place};

/// The lane's name.
pub const LANE: &str = "upgrade";

/// The title of its table.
pub const TITLE: &str = "4 KiB random reads of a memory disk, in User Mode Linux";

const NEEDS: &[Need] = &[
    Need::Tools,
    Need::Kernel(Kernel::Uml),
    Need::Kernel(Kernel::X86),
];

/// The loads: one request after the other, many, and many by a program that takes little time for itself.
const LOADS: &[Load] = &[
    Load::one_by_one(1),
    Load::one_by_one(32),
    Load {
        depth: 32,
        at_once: 16,
    },
];

/// Measures: one boot, and one telling of the story, in each round.
///
/// # Errors
/// The story does not end well.
pub fn run(settings: &Settings, row: &mut dyn FnMut(Row)) -> Result<()> {
    let loads = if settings.quick { &LOADS[1..2] } else { LOADS };
    let loads: Vec<Load> = loads
        .iter()
        .copied()
        .filter(|load| settings.wants(LANE, TITLE, &load.to_string()))
        .collect();
    if loads.is_empty() {
        return Ok(());
    }
    let mut paths = runner::prepare(&settings.repo, NEEDS, Build::Product, settings.yes)?;
    paths.server = settings.server()?.to_owned();
    let mut rounds = Vec::new();
    for round in 1..=settings.rounds {
        let folder = tempfile::tempdir().context("cannot make a temporary directory")?;
        let part = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir(&path)
                .with_context(|| format!("cannot make {}", path.display()))?;
            anyhow::Ok(path)
        };
        let (scratch, exchange) = (part("scratch")?, part("exchange")?);
        let cx = Context::new(Place::Host, paths.clone(), scratch, exchange, Value::Null);
        eprintln!("lab: upgrade, round {round} of {}", settings.rounds);
        let say = |text: &str| eprintln!("lab:   {text}");
        let found = upgraded::tell(&cx, &loads, &say)?;
        upgraded::table(&found).iter().for_each(|line| say(line));
        rounds.push(found);
    }
    for load in loads {
        let of_load = |what: &str| -> Vec<&upgraded::Row> {
            let rows = rounds.iter().flat_map(|round| &round.rows);
            rows.filter(|row| row.load == load && row.what == what)
                .collect()
        };
        let mut candidates = Vec::new();
        for what in [PROGRAM, PROGRAM_UPGRADED, GUEST, GUEST_UPGRADED] {
            let rows = of_load(what);
            let series = |of: fn(&upgraded::Row) -> f64| {
                let values: Vec<f64> = rows.iter().map(|row| of(row)).collect();
                Samples::of(&values)
            };
            candidates.push(Candidate {
                name: what.to_owned(),
                iops: series(|row| row.bench.iops)
                    .with_context(|| format!("the story has no '{what}'"))?,
                cpu_us_per_io: series(|row| row.server_us),
                syscalls_per_io: series(upgraded::Row::all_calls).map(|calls| calls.median),
                ..Candidate::default()
            });
        }
        row(Row {
            lane: LANE.to_owned(),
            title: TITLE.to_owned(),
            load: load.to_string(),
            candidates,
        });
    }
    Ok(())
}
