//! The document a run leaves behind: what ran where, every sample, and the goals.

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::client::Percentiles;
use super::figures::Samples;
use super::machine::Facts;
use super::table;

/// Everything about one run; `bench.json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Document {
    /// The shape of this document.
    pub format: u32,
    /// Where it ran.
    pub machine: Facts,
    /// What was measured, in git's words.
    pub revision: String,
    /// How it was called.
    pub command: String,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// How long it took.
    pub seconds: u64,
    /// The measurements.
    pub rows: Vec<Row>,
    /// Figures that are no requests per second.
    #[serde(default)]
    pub measures: Vec<Measure>,
    /// Two revisions of ours, with `--compare`.
    #[serde(default)]
    pub ratios: Vec<Ratio>,
    /// The goals that the rows have something to say about.
    pub goals: Vec<Goal>,
    /// What was not measured, and why.
    pub left_out: Vec<String>,
}

/// The current shape.
pub const FORMAT: u32 = 1;

/// Candidates under one load, measured in turn.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The lane it belongs to.
    pub lane: String,
    /// Rows of one table have the same title.
    pub title: String,
    /// The load, in the order and words of the table's first columns.
    pub load: String,
    /// Who was measured.
    pub candidates: Vec<Candidate>,
}

/// One server under one load.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Candidate {
    /// Its name, the same in all rows.
    pub name: String,
    /// Requests per second.
    pub iops: Samples,
    /// Microseconds of processor time of the server for a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_us_per_io: Option<Samples>,
    /// Times a thread of the server went to sleep for a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waits_per_io: Option<Samples>,
    /// System calls of the server for a request, counted in a run of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub syscalls_per_io: Option<f64>,
    /// Instructions of the server in user mode for a request, in the same run as the system calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instructions_per_io: Option<f64>,
    /// How long requests took, in the lane that measures that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_us: Option<Latency>,
}

/// Percentiles of the time that a request takes, in microseconds, one sample for each round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    /// Half of the requests are faster.
    pub p50: Samples,
    /// One of a hundred is slower.
    pub p99: Samples,
    /// One of a thousand is slower.
    pub p99_9: Samples,
}

impl Latency {
    /// Those of the rounds; `None` without rounds.
    pub fn of(rounds: &[Percentiles]) -> Option<Self> {
        Some(Self {
            p50: Samples::of_each(rounds, |one| one.p50)?,
            p99: Samples::of_each(rounds, |one| one.p99)?,
            p99_9: Samples::of_each(rounds, |one| one.p99_9)?,
        })
    }
}

/// A figure by itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measure {
    /// The lane it belongs to.
    pub lane: String,
    /// What was measured.
    pub what: String,
    /// Its unit.
    pub unit: String,
    /// The figure.
    pub value: Samples,
}

/// Two candidates of one row, in the rounds they have in common.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ratio {
    /// Title and load of the row.
    pub what: String,
    /// Who is above the line.
    pub above: String,
    /// Who is below it.
    pub below: String,
    /// Requests per second.
    pub iops: Samples,
    /// Processor time for a request.
    pub cpu: Option<Samples>,
}

/// Something that was to be reached, and what was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Goal {
    /// What is compared, under which load.
    pub what: String,
    /// `>=` or `<=` and a number.
    pub goal: String,
    /// The median.
    pub reached: f64,
    /// The spread over the rounds, if there were several.
    pub spread: Option<(f64, f64)>,
    /// Whether the median is on the right side.
    pub met: bool,
}

/// On which side of a number a goal is.
#[derive(Clone, Copy, Debug)]
pub enum Bound {
    /// No less than this.
    AtLeast(f64),
    /// No more than this.
    AtMost(f64),
}

impl Goal {
    /// A goal that has been measured.
    pub fn new(what: &str, bound: Bound, reached: &Samples) -> Self {
        let (goal, met) = match bound {
            Bound::AtLeast(least) => (format!(">= {least}"), reached.median >= least),
            Bound::AtMost(most) => (format!("<= {most}"), reached.median <= most),
        };
        Goal {
            what: what.to_owned(),
            goal,
            reached: reached.median,
            spread: (reached.samples.len() > 1).then_some((reached.min, reached.max)),
            met,
        }
    }
}

impl Document {
    /// The row of a lane with this title and load.
    pub fn row(&self, lane: &str, title: &str, load: &str) -> Option<&Row> {
        self.rows
            .iter()
            .find(|row| row.lane == lane && row.title == title && row.load == load)
    }

    /// Adds a row, and shows it.
    pub fn keep(&mut self, row: Row) {
        eprintln!("lab: {}", table::summary(&row));
        self.rows.push(row);
    }

    /// Adds a figure by itself, if there is a sample of it.
    pub fn measure(&mut self, lane: &str, what: &str, unit: &str, samples: &[f64]) {
        self.measures
            .extend(Samples::of(samples).map(|value| Measure {
                lane: lane.to_owned(),
                what: what.to_owned(),
                unit: unit.to_owned(),
                value,
            }));
    }

    /// Notes once what was not measured, and why.
    pub fn leave_out(&mut self, why: String) {
        if !self.left_out.contains(&why) {
            self.left_out.push(why);
        }
    }

    /// Adds what another run has measured. The goals are to be looked at anew.
    pub fn append(&mut self, other: Document) -> Result<()> {
        ensure!(
            self.format == other.format,
            "the results have different formats; measure again"
        );
        ensure!(
            self.revision == other.revision,
            "the results are of different revisions, {} and {}",
            self.revision,
            other.revision
        );
        ensure!(
            self.machine == other.machine,
            "the results are of different machines"
        );
        let twice = other
            .rows
            .iter()
            .find(|row| self.row(&row.lane, &row.title, &row.load).is_some());
        if let Some(row) = twice {
            bail!("{}: {}: {} is there twice", row.lane, row.title, row.load);
        }
        self.command = format!("{}; {}", self.command, other.command);
        self.started = self.started.min(other.started);
        self.seconds += other.seconds;
        self.rows.extend(other.rows);
        self.measures.extend(other.measures);
        self.ratios.extend(other.ratios);
        self.left_out.extend(other.left_out);
        Ok(())
    }
}

impl Row {
    /// The candidate of this name.
    pub fn candidate(&self, name: &str) -> Option<&Candidate> {
        self.candidates.iter().find(|one| one.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lane: &str, revision: &str) -> Document {
        Document {
            format: FORMAT,
            revision: revision.to_owned(),
            command: format!("bench {lane}"),
            started: 1,
            seconds: 2,
            rows: vec![Row {
                lane: lane.to_owned(),
                title: "null".to_owned(),
                load: "depth 1".to_owned(),
                candidates: Vec::new(),
            }],
            ..Document::default()
        }
    }

    #[test]
    fn runs_of_one_revision_make_one_document() {
        let mut whole = run("native", "a");
        whole.append(run("vm", "a")).expect("they belong together");
        assert_eq!((whole.rows.len(), whole.seconds), (2, 4));
        assert_eq!(whole.command, "bench native; bench vm");
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let mut whole = run("native", "a");
        assert!(whole.append(run("vm", "b")).is_err(), "another revision");
        assert!(whole.append(run("native", "a")).is_err(), "the same row");
        let mut elsewhere = run("vm", "a");
        elsewhere.machine.processors += 1;
        assert!(whole.append(elsewhere).is_err(), "another machine");
        assert_eq!(whole.rows.len(), 1, "and nothing of it is kept");
    }
}
