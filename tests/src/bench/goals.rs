//! What was to be reached, and how the rows of a run stand to it. Ratios are medians over the pairs
//! of a run; a goal whose rows were not measured is not mentioned.

use super::figures::Samples;
use super::record::{Bound, Document, Goal, Latency};
use super::ring::{self, Where};
use super::{exports, mixed, upgrade, vm};
use crate::suites::upgraded::{GUEST, GUEST_UPGRADED, PROGRAM, PROGRAM_UPGRADED};

use Bound::{AtLeast, AtMost};

const ADAPTIVE: &str = "ublkup";
const ALWAYS: &str = "ublkup --poll-us always";
const QEMU: &str = "qemu-storage-daemon";
const FIO: &str = "fio on the file";

const NULL: &str = "null: 4 KiB random reads";
const MEM: &str = "mem: 4 KiB random reads";
const DIRECT: &str = "file, O_DIRECT: 4 KiB random reads";
const TMPFS: &str = "file, tmpfs: 4 KiB random reads";

/// Every goal that this document has figures for.
pub fn of(document: &Document) -> Vec<Goal> {
    let mut goals = native_ratios(document);
    goals.extend(native_costs(document));
    goals.extend(block_door(document));
    goals.extend(upgraded(document));
    goals.extend(many_exports(document));
    goals.extend(rings(document));
    goals.extend(tails(document));
    goals
}

/// The slowest requests of ours under a mixed load, against the best of the others in the median. Ours is the row
/// without options, which users get.
fn tails(document: &Document) -> Vec<Goal> {
    let mut goals = Vec::new();
    for row in document.rows.iter().filter(|row| row.lane == mixed::LANE) {
        for (name, of) in TAILS {
            let ours = row
                .candidate(ADAPTIVE)
                .and_then(|one| one.latency_us.as_ref());
            let others = row.candidates.iter();
            let others = others.filter(|one| !one.name.starts_with(ADAPTIVE) && one.name != FIO);
            let others = others.filter_map(|one| Some((&one.name, of(one.latency_us.as_ref()?))));
            let best = others.min_by(|one, other| one.1.median.total_cmp(&other.1.median));
            if let Some(((best, theirs), ours)) = best.zip(ours.map(of))
                && let Some(ratio) = ours.ratio(theirs)
            {
                let what = format!("{}, {}: {name} of {ADAPTIVE} ÷ {best}", row.title, row.load);
                goals.push(Goal::new(&what, AtMost(1.1), &ratio));
            }
        }
    }
    goals
}

/// Takes a percentile out of all.
type OfLatency = fn(&Latency) -> &Samples;

/// Percentiles that have goals.
const TAILS: [(&str, OfLatency); 2] = [
    ("p99", |latency| &latency.p99),
    ("p99.9", |latency| &latency.p99_9),
];

/// Records of 16 bytes through a ring with both ends mapped, against the pipe in the same round.
fn rings(document: &Document) -> Vec<Goal> {
    let goal = |(place, ring): (Where, &str)| {
        let row = document.row(ring::LANE, &place.records(), &ring::words(16))?;
        let ratio = row
            .candidate(ring)?
            .iops
            .ratio(&row.candidate(ring::PIPE)?.iops)?;
        let what = format!("16-byte {}: {ring} ÷ {}", place.records(), ring::PIPE);
        Some(Goal::new(&what, AtLeast(7.0), &ratio))
    };
    RINGS.iter().copied().filter_map(goal).collect()
}

const RINGS: [(Where, &str); 3] = [
    (Where::Here, ring::SHARED),
    (Where::Uml, ring::KERNEL),
    (Where::Pc, ring::KERNEL),
];

/// Requests per second: title, load, ours, theirs, how many times theirs.
const SPEED: &[(&str, &str, &str, &str, f64)] = &[
    (NULL, "depth 32, client sleeps", ALWAYS, QEMU, 3.5),
    (NULL, "depth 32, client polls", ALWAYS, QEMU, 3.0),
    (NULL, "depth 32, client sleeps", ADAPTIVE, QEMU, 2.0),
    (NULL, "depth 32, client polls", ADAPTIVE, QEMU, 2.0),
    (NULL, "depth 1, client polls", ADAPTIVE, QEMU, 4.0),
    (NULL, "depth 1, client sleeps", ADAPTIVE, QEMU, 2.0),
    (MEM, "depth 32, client polls", ADAPTIVE, QEMU, 1.3),
    (DIRECT, "depth 32, client sleeps", ADAPTIVE, FIO, 0.97),
    (DIRECT, "depth 32, client polls", ADAPTIVE, FIO, 0.97),
    (DIRECT, "depth 128, client sleeps", ADAPTIVE, FIO, 0.97),
    (DIRECT, "depth 128, client polls", ADAPTIVE, FIO, 0.97),
    (DIRECT, "depth 1, client sleeps", ADAPTIVE, QEMU, 1.5),
    (DIRECT, "depth 1, client polls", ADAPTIVE, QEMU, 1.5),
    (TMPFS, "depth 32, client sleeps", ADAPTIVE, QEMU, 2.0),
    (TMPFS, "depth 32, client polls", ADAPTIVE, QEMU, 2.0),
];

/// Processor time for a request: title, load, ours, theirs, how many times theirs.
const CPU: &[(&str, &str, &str, &str, f64)] = &[
    (NULL, "depth 32, client sleeps", ADAPTIVE, QEMU, 0.5),
    (NULL, "depth 32, client polls", ADAPTIVE, QEMU, 0.5),
    (DIRECT, "depth 32, client sleeps", ADAPTIVE, QEMU, 0.7),
    (DIRECT, "depth 32, client polls", ADAPTIVE, QEMU, 0.7),
    (DIRECT, "depth 128, client sleeps", ADAPTIVE, QEMU, 0.7),
    (DIRECT, "depth 128, client polls", ADAPTIVE, QEMU, 0.7),
];

fn native_ratios(document: &Document) -> Vec<Goal> {
    let pair = |title: &str, load: &str, ours: &str, theirs: &str| {
        let row = document.row("native", title, load)?;
        Some((row.candidate(ours)?, row.candidate(theirs)?))
    };
    let speed = SPEED.iter().filter_map(|&(title, load, us, them, least)| {
        let (ours, theirs) = pair(title, load, us, them)?;
        let what = format!("{title}, {load}: IOPS of {us} ÷ {them}");
        let ratio = ours.iops.ratio(&theirs.iops)?;
        Some(Goal::new(&what, AtLeast(least), &ratio))
    });
    let cpu = CPU.iter().filter_map(|&(title, load, us, them, most)| {
        let (ours, theirs) = pair(title, load, us, them)?;
        let what = format!("{title}, {load}: server CPU for a request, {us} ÷ {them}");
        let ratio = ours
            .cpu_us_per_io
            .as_ref()?
            .ratio(theirs.cpu_us_per_io.as_ref()?)?;
        Some(Goal::new(&what, AtMost(most), &ratio))
    });
    speed.chain(cpu).collect()
}

/// What a request may cost by itself.
fn native_costs(document: &Document) -> Vec<Goal> {
    let loads = ["depth 32, client sleeps", "depth 32, client polls"];
    let mut goals = Vec::new();
    for load in loads {
        let row = document.row("native", NULL, load);
        let Some(ours) = row.and_then(|row| row.candidate(ADAPTIVE)) else {
            continue;
        };
        for (name, most, cost) in [
            ("system calls", 0.1, ours.syscalls_per_io),
            ("instructions", 400.0, ours.instructions_per_io),
        ] {
            if let Some(cost) = cost.and_then(|cost| Samples::of(&[cost])) {
                let what = format!("{NULL}, {load}: {name} for a request, {ADAPTIVE}");
                goals.push(Goal::new(&what, AtMost(most), &cost));
            }
        }
    }
    goals
}

/// The ublk door in the machine that the others run in too.
fn block_door(document: &Document) -> Vec<Goal> {
    let mut goals = Vec::new();
    for row in document.rows.iter().filter(|row| row.lane == vm::LANE) {
        let Some(ours) = row.candidate(vm::OURS) else {
            continue;
        };
        let all: &[(&str, f64)] = match row.title.as_str() {
            vm::NULL => &[(vm::KUBLK, 1.0), (vm::RUBLK, 1.2)],
            vm::LARGE => &[(vm::KUBLK_ZERO_COPY, 1.0), (vm::KUBLK_AUTO, 1.0)],
            _ => &[],
        };
        for (name, least) in all {
            let ratio = row
                .candidate(name)
                .and_then(|theirs| ours.iops.ratio(&theirs.iops));
            if let Some(ratio) = ratio {
                let what = format!("{}, {}: IOPS of {} ÷ {name}", row.title, row.load, vm::OURS);
                goals.push(Goal::new(&what, AtLeast(*least), &ratio));
            }
        }
    }
    goals
}

/// A guest, and a program, before and after the upgrade.
fn upgraded(document: &Document) -> Vec<Goal> {
    let pair = |load: &str, who: &str, before: &str, after: &str| {
        let row = document.row(upgrade::LANE, upgrade::TITLE, load)?;
        let (before, after) = (row.candidate(before)?, row.candidate(after)?);
        let iops = after.iops.ratio(&before.iops)?;
        let calls = Samples::of(&[before.syscalls_per_io? / after.syscalls_per_io?])?;
        let what = |what: &str| format!("{who}, {load}: {what} the upgrade");
        Some([
            Goal::new(&what("IOPS after ÷ before"), AtLeast(2.0), &iops),
            Goal::new(
                &what("system calls for a request before ÷ after"),
                AtLeast(5.0),
                &calls,
            ),
        ])
    };
    [
        pair("depth 32", "guest", GUEST, GUEST_UPGRADED),
        pair("depth 32, 16 at once", "guest", GUEST, GUEST_UPGRADED),
        pair("depth 32", "program", PROGRAM, PROGRAM_UPGRADED),
        pair("depth 32, 16 at once", "program", PROGRAM, PROGRAM_UPGRADED),
    ]
    .into_iter()
    .flatten()
    .flatten()
    .collect()
}

/// Many exports in one process.
fn many_exports(document: &Document) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (part, bound) in [
        (": CPU", AtMost(0.1)),
        (": memory for each beyond the first", AtMost(2.0)),
        (": the least share, of the mean", AtLeast(0.7)),
    ] {
        for one in &document.measures {
            if one.lane == exports::LANE && one.what.ends_with(part) {
                let what = format!("{} {}", one.what, one.unit);
                goals.push(Goal::new(what.trim(), bound, &one.value));
            }
        }
    }
    goals
}

#[cfg(test)]
mod tests {
    use super::super::client::Percentiles;
    use super::super::native;
    use super::super::record::{Candidate, Row};
    use super::*;

    fn candidate(name: &str, iops: &[f64], cpu_us: &[f64]) -> Candidate {
        Candidate {
            name: name.to_owned(),
            iops: Samples::of(iops).expect("there are samples"),
            cpu_us_per_io: Samples::of(cpu_us),
            ..Candidate::default()
        }
    }

    #[test]
    fn goals_are_medians_of_pairs_and_only_of_what_was_measured() {
        let ours = candidate(ADAPTIVE, &[30.0, 20.0, 50.0], &[1.0, 1.0, 1.0]);
        let theirs = candidate(QEMU, &[10.0, 20.0, 20.0], &[1.0, 4.0, 4.0]);
        let goals = of(&Document {
            rows: vec![Row {
                lane: "native".to_owned(),
                title: NULL.to_owned(),
                load: "depth 32, client sleeps".to_owned(),
                candidates: vec![ours, theirs],
            }],
            ..Document::default()
        });
        assert_eq!(goals.len(), 2, "{goals:?}");
        assert!((goals[0].reached - 2.5).abs() < 1e-9 && goals[0].met);
        assert_eq!(goals[0].goal, ">= 2");
        assert_eq!(goals[0].spread, Some((1.0, 3.0)));
        assert!((goals[1].reached - 0.25).abs() < 1e-9 && goals[1].met);
        assert_eq!(goals[1].goal, "<= 0.5");
    }

    #[test]
    fn tails_are_compared_with_the_best_of_the_other_servers() {
        let one = |name: &str, p99: f64| Candidate {
            latency_us: Latency::of(&[Percentiles {
                p99,
                ..Percentiles::default()
            }]),
            ..candidate(name, &[1.0], &[1.0])
        };
        let goals = of(&Document {
            rows: vec![Row {
                lane: mixed::LANE.to_owned(),
                title: "t".to_owned(),
                load: "l".to_owned(),
                candidates: vec![
                    one(ADAPTIVE, 12.0),
                    one(ALWAYS, 1.0),
                    one(QEMU, 10.0),
                    one("loop driver", 20.0),
                    one(FIO, 2.0),
                ],
            }],
            ..Document::default()
        });
        // Nothing is known of the others' p99.9.
        assert_eq!(goals.len(), 1, "{goals:?}");
        assert!(goals[0].what.ends_with(QEMU), "{goals:?}");
        assert!((goals[0].reached - 1.2).abs() < 1e-9 && !goals[0].met);
    }

    #[test]
    fn every_goal_is_about_a_load_that_a_full_run_measures() {
        let loads: Vec<(String, String)> = native::loads(false)
            .iter()
            .map(|load| (load.title(), load.words()))
            .collect();
        for (title, load, ..) in SPEED.iter().chain(CPU) {
            let this = ((*title).to_owned(), (*load).to_owned());
            assert!(loads.contains(&this), "{this:?}");
        }
    }
}
