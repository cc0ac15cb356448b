//! What the story found, and the table of it.

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
    /// Its 99th percentile, if somebody looked.
    pub p99_us: Option<f64>,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// Who read, and how.
    pub what: String,
    /// Requests under way.
    pub depth: u32,
    /// What fio saw.
    pub bench: Bench,
    /// Processor time of the server per request.
    pub server_us: f64,
    /// Processor time of QEMU per request, the emulated guest included.
    pub qemu_us: Option<f64>,
    /// System calls of server and QEMU together per request.
    pub calls: f64,
}

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
        "{:<34} {:>5} {:>8} {:>9} {:>9} {:>11} {:>9} {:>9}",
        "4 KiB random reads, memory disk",
        "depth",
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
            "{:<34} {:>5} {:>8.0} {:>9.0} {:>9} {:>11.1} {:>9} {:>9.2}",
            row.what,
            row.depth,
            row.bench.iops,
            row.bench.mean_us,
            p99,
            row.server_us,
            qemu,
            row.calls
        ));
    }
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
