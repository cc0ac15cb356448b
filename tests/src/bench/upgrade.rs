//! The same job in the same guest before and after the upgrade, in one User Mode Linux; see
//! [`upgraded`], whose story also checks that the data is right.

use anyhow::{Context as _, Result};

use super::Settings;
use super::figures::Samples;
use super::record::{Candidate, Document, Row};
use crate::kernel::Kernel;
use crate::suites::upgraded::{self, GUEST, GUEST_UPGRADED, Load, PROGRAM, PROGRAM_UPGRADED};
use crate::test::Context;

/// The lane's name.
pub const LANE: &str = "upgrade";

/// The title of its table.
pub const TITLE: &str = "4 KiB random reads of a memory disk, in User Mode Linux";

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
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    let loads = if settings.quick { &LOADS[1..2] } else { LOADS };
    let loads: Vec<Load> = loads
        .iter()
        .copied()
        .filter(|load| settings.wants(LANE, TITLE, &load.to_string()))
        .collect();
    if loads.is_empty() {
        return Ok(());
    }
    let paths = settings.prepare(&[Kernel::Uml, Kernel::X86], true)?;
    let mut rounds = Vec::new();
    for round in 1..=settings.rounds {
        let (_folder, cx) = Context::on_host(paths.clone())?;
        eprintln!("lab: upgrade, round {round} of {}", settings.rounds);
        let say = |text: &str| eprintln!("lab:   {text}");
        let found = upgraded::tell(&cx, &loads, &say)?;
        upgraded::table(&found).iter().for_each(|line| say(line));
        rounds.push(found);
    }
    for load in loads {
        let mut candidates = Vec::new();
        for what in [PROGRAM, PROGRAM_UPGRADED, GUEST, GUEST_UPGRADED] {
            let rows = rounds.iter().flat_map(|round| &round.rows);
            let rows: Vec<_> = rows
                .filter(|row| row.load == load && row.what == what)
                .collect();
            candidates.push(Candidate {
                name: what.to_owned(),
                iops: Samples::of_each(&rows, |row| row.bench.iops)
                    .with_context(|| format!("the story has no '{what}'"))?,
                cpu_us_per_io: Samples::of_each(&rows, |row| row.server_us),
                syscalls_per_io: Samples::of_each(&rows, |row| row.all_calls())
                    .map(|calls| calls.median),
                ..Candidate::default()
            });
        }
        document.keep(Row {
            lane: LANE.to_owned(),
            title: TITLE.to_owned(),
            load: load.to_string(),
            candidates,
        });
    }
    Ok(())
}
