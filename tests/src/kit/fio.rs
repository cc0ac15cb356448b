//! fio with a job built in Rust and its JSON read back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use testkit::shell::{Shell, last_lines};

/// One fio job. The defaults are direct I/O through `io_uring`, 4 KiB, depth 1.
#[derive(Debug)]
pub struct Fio {
    options: Vec<(String, String)>,
    env: Vec<(String, String)>,
    file: PathBuf,
    limit: Duration,
}

impl Fio {
    /// A job on a block device or file.
    pub fn new(file: &Path) -> Self {
        Fio {
            options: Vec::new(),
            env: Vec::new(),
            file: file.to_owned(),
            limit: Duration::from_secs(120),
        }
        .option("ioengine", "io_uring")
        .option("direct", "1")
        .option("rw", "randread")
        .option("bs", "4k")
        .option("randrepeat", "1")
        .option("group_reporting", "1")
    }

    /// Sets a fio option; the last value of an option counts.
    pub fn option(mut self, name: &str, value: impl ToString) -> Self {
        self.options.retain(|(known, _)| known != name);
        if name == "bsrange" || name == "bssplit" {
            self.options.retain(|(known, _)| known != "bs");
        }
        self.options.push((name.to_owned(), value.to_string()));
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The number of requests in flight.
    pub fn depth(self, depth: u32) -> Self {
        self.option("iodepth", depth)
    }

    /// The number of processes, each with its own part of the disk.
    pub fn jobs(self, jobs: u32) -> Self {
        self.option("numjobs", jobs)
    }

    /// How much of the disk to touch, in fio's notation (`64m`).
    pub fn size(self, size: &str) -> Self {
        self.option("size", size)
    }

    /// Writes checksummed blocks and reads all of them back.
    pub fn verify(self) -> Self {
        self.option("verify", "crc32c")
            .option("verify_fatal", "1")
            .option("do_verify", "1")
            .option("verify_state_save", "0")
    }

    /// Kills fio after this long.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the job.
    pub fn run(self) -> Result<Report> {
        let dir = tempfile::tempdir().context("cannot make a temporary directory")?;
        let output = dir.path().join("fio.json");
        let mut fio = Shell::new("fio")
            .args(["--name=job", "--output-format=json", "--eta=never"])
            .arg(format!("--output={}", output.display()))
            .arg(format!("--filename={}", self.file.display()))
            .dir(dir.path())
            .limit(self.limit);
        for (name, value) in &self.env {
            fio = fio.env(name, value);
        }
        for (name, value) in &self.options {
            fio = fio.arg(format!("--{name}={value}"));
        }
        let finished = fio.finish()?;
        let text = std::fs::read_to_string(&output).unwrap_or_default();
        if finished.code() != 0 {
            bail!(
                "fio on {} failed with code {}; it said:\n{}\n{}",
                self.file.display(),
                finished.code(),
                finished.tail(),
                last_lines(text.split("\n{").next().unwrap_or(""), 10)
            );
        }
        parse(&text).with_context(|| format!("fio on {}", self.file.display()))
    }
}

/// What fio measured.
#[derive(Debug, Deserialize)]
pub struct Report {
    /// One entry per job, or one in all (`group_reporting`).
    pub jobs: Vec<Job>,
}

/// One job's figures.
#[derive(Debug, Deserialize)]
pub struct Job {
    /// The first error (errno), or zero.
    pub error: i32,
    /// Reads, including those that verify.
    #[serde(default)]
    pub read: Direction,
    /// Writes.
    #[serde(default)]
    pub write: Direction,
    /// Discards.
    #[serde(default)]
    pub trim: Direction,
    /// All of them together, instead of each (`unified_rw_reporting`).
    #[serde(default)]
    pub mixed: Direction,
}

/// The figures of one direction.
#[derive(Debug, Default, Deserialize)]
pub struct Direction {
    /// Requests completed.
    pub total_ios: u64,
    /// Requests per second; never assert on it.
    pub iops: f64,
    /// From submission to completion.
    #[serde(default)]
    pub clat_ns: Latency,
}

/// A latency as fio writes it.
#[derive(Debug, Default, Deserialize)]
pub struct Latency {
    #[serde(default)]
    mean: f64,
    #[serde(default)]
    percentile: BTreeMap<String, u64>,
}

/// A latency in microseconds; never assert on it.
#[derive(Clone, Copy, Debug)]
pub struct LatencyUs {
    /// Mean.
    pub mean_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
}

impl Report {
    /// Completed reads of all jobs.
    pub fn reads(&self) -> u64 {
        self.jobs.iter().map(|job| job.read.total_ios).sum()
    }

    /// Completed writes of all jobs.
    pub fn writes(&self) -> u64 {
        self.jobs.iter().map(|job| job.write.total_ios).sum()
    }

    /// Completed discards of all jobs.
    pub fn trims(&self) -> u64 {
        self.jobs.iter().map(|job| job.trim.total_ios).sum()
    }

    /// The completion latency of the first job's reads, if fio told it.
    pub fn read_latency(&self) -> Option<LatencyUs> {
        let latency = &self.jobs.first()?.read.clat_ns;
        let p99_ns = *latency.percentile.get("99.000000")?;
        Some(LatencyUs {
            mean_us: latency.mean / 1e3,
            p99_us: p99_ns as f64 / 1e3,
        })
    }

    /// Completed requests of all jobs.
    pub fn requests(&self) -> u64 {
        let mixed = self.jobs.iter().map(|job| job.mixed.total_ios);
        self.reads() + self.writes() + self.trims() + mixed.sum::<u64>()
    }

    /// A percentile of the completion latency, in fio's notation (`99.900000`), of the first job's reads and writes
    /// together (`unified_rw_reporting`).
    pub fn mixed_percentile_us(&self, percent: &str) -> Option<f64> {
        let latency = &self.jobs.first()?.mixed.clat_ns;
        latency.percentile.get(percent).map(|ns| *ns as f64 / 1e3)
    }

    /// Reads, writes and discards per second of all jobs together.
    pub fn iops(&self) -> f64 {
        self.jobs
            .iter()
            .map(|job| job.read.iops + job.write.iops + job.trim.iops + job.mixed.iops)
            .sum()
    }
}

/// Reads fio's output file: messages may come before the JSON.
fn parse(text: &str) -> Result<Report> {
    let start = if text.starts_with('{') {
        0
    } else {
        text.find("\n{")
            .map(|at| at + 1)
            .with_context(|| format!("fio wrote no result, only:\n{}", last_lines(text, 10)))?
    };
    let report: Report =
        serde_json::from_str(&text[start..]).context("fio's result cannot be understood")?;
    ensure!(!report.jobs.is_empty(), "fio ran no job");
    if let Some(job) = report.jobs.iter().find(|job| job.error != 0) {
        bail!(
            "fio met an error: {}; it said:\n{}",
            std::io::Error::from_raw_os_error(job.error),
            last_lines(&text[..start], 10)
        );
    }
    ensure!(report.requests() > 0, "fio completed no request");
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(error: i32, reads: u64) -> String {
        format!(
            r#"note: both iodepth >= 1 and synchronous I/O engine are selected
{{
  "fio version" : "fio-3.33",
  "jobs" : [ {{ "jobname" : "job", "error" : {error},
    "read" : {{ "io_bytes" : 4096, "total_ios" : {reads}, "iops" : 10.5 }},
    "write" : {{ "io_bytes" : 0, "total_ios" : 0, "iops" : 0.0 }},
    "trim" : {{ "io_bytes" : 0, "total_ios" : 0, "iops" : 0.0 }} }} ]
}}
"#
        )
    }

    #[test]
    fn a_result_behind_messages_is_found() {
        let report = parse(&recorded(0, 3)).expect("a good result");
        assert_eq!((report.reads(), report.writes()), (3, 0));
    }

    #[test]
    fn an_error_inside_a_result_is_an_error() {
        let error = parse(&recorded(84, 3)).expect_err("EILSEQ is a failed verification");
        assert!(error.to_string().contains("error"), "{error}");
    }

    #[test]
    fn a_job_that_did_nothing_is_an_error() {
        assert!(parse(&recorded(0, 0)).is_err());
    }

    #[test]
    fn a_result_cut_short_is_an_error() {
        let whole = recorded(0, 3);
        assert!(parse(&whole[..whole.len() / 2]).is_err());
        assert!(parse("").is_err());
    }

    #[test]
    fn reads_and_writes_together_have_percentiles() {
        let text = r#"{ "jobs": [ { "error": 0, "mixed": { "total_ios": 7, "iops": 2.0,
            "clat_ns": { "mean": 1.0, "percentile": { "99.900000": 8000 } } } } ] }"#;
        let report = parse(text).expect("a good result");
        assert_eq!((report.requests(), report.iops()), (7, 2.0));
        assert_eq!(report.mixed_percentile_us("99.900000"), Some(8.0));
        assert_eq!(report.mixed_percentile_us("50.000000"), None);
    }

    #[test]
    fn a_block_size_range_replaces_the_block_size() {
        let fio = Fio::new(Path::new("/x")).option("bsrange", "512-1m");
        assert!(!fio.options.iter().any(|(name, _)| name == "bs"));
    }
}
