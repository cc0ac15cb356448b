//! What the story found, and the table of it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What one fio job measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Bench {
    /// Requests.
    pub requests: u64,
    /// Per second.
    pub iops: f64,
    /// Mean completion latency.
    pub mean_us: f64,
    /// Its 99th percentile, if it was measured.
    pub p99_us: Option<f64>,
}

/// Reads that fio makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Under way.
    pub depth: u32,
    /// So many are asked for, and their answers awaited, with one system call. With more than one the file and
    /// the memory are registered as well: all that a program can do to make requests cheap for itself.
    pub at_once: u32,
}

impl Load {
    /// As fio does when nobody says otherwise.
    pub const fn one_by_one(depth: u32) -> Self {
        Self { depth, at_once: 1 }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "depth {}", self.depth)?;
        match self.at_once {
            1 => Ok(()),
            many => write!(f, ", {many} at once"),
        }
    }
}

/// One line of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Who read, and how.
    pub what: String,
    /// The load.
    pub load: Load,
    /// What fio saw.
    pub bench: Bench,
    /// Processor time of the server per request.
    pub server_us: f64,
    /// Processor time of QEMU per request, the emulated guest included.
    pub qemu_us: Option<f64>,
    /// System calls of server and QEMU together per request, by name, the most frequent first.
    pub calls: Vec<(String, f64)>,
}

impl Row {
    /// All system calls of server and QEMU together per request.
    pub fn all_calls(&self) -> f64 {
        self.calls.iter().map(|call| call.1).sum()
    }

    /// Those of them that say most.
    fn main_calls(&self) -> String {
        let named = self.calls.iter().take(SHOWN_CALLS);
        let named: Vec<_> = named
            .map(|(name, count)| format!("{name} {count:.2}"))
            .collect();
        named.join(", ")
    }
}

/// So many system calls are named.
const SHOWN_CALLS: usize = 6;

/// What the story found.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Findings {
    /// The table.
    pub rows: Vec<Row>,
    /// The kernel that it was measured on.
    pub kernel: String,
    /// The emulator's version.
    pub qemu: String,
}

/// The table, as lines.
pub fn table(findings: &Findings) -> Vec<String> {
    let mut lines = vec![format!(
        "{:<34} {:<20} {:>8} {:>9} {:>9} {:>11} {:>9} {:>9}",
        "4 KiB random reads, memory disk",
        "",
        "IOPS",
        "mean µs",
        "p99 µs",
        "server µs",
        "QEMU µs",
        "calls"
    )];
    for row in &findings.rows {
        let known = |value: Option<f64>, digits| {
            value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
        };
        let (p99, qemu) = (known(row.bench.p99_us, 0), known(row.qemu_us, 1));
        lines.push(format!(
            "{:<34} {:<20} {:>8.0} {:>9.0} {:>9} {:>11.1} {:>9} {:>9.2}",
            row.what,
            row.load.to_string(),
            row.bench.iops,
            row.bench.mean_us,
            p99,
            row.server_us,
            qemu,
            row.all_calls()
        ));
    }
    lines.push("Of the calls:".to_owned());
    lines.extend(
        findings
            .rows
            .iter()
            .map(|row| format!("{}, {}: {}", row.what, row.load, row.main_calls())),
    );
    lines.push(format!(
        "User Mode Linux {}, one processor; {}, TCG: figures to compare with each other only.",
        findings.kernel, findings.qemu
    ));
    lines.push(
        "µs: processor time per request, QEMU's with the emulated guest in it; calls: system calls \
         of server and QEMU per request."
            .to_owned(),
    );
    lines
}
