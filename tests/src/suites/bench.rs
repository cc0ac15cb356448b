//! `cargo lab bench` itself: what it counts is what happened. Nothing here is about speed.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use testkit::shell::Shell;

use crate::bench::attach::Client;
use crate::bench::client::{End, Op, Order, Waiting};
use crate::bench::guard;
use crate::bench::record::Document;
use crate::bench::ring;
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[
    test!(the_client_and_the_server_count_the_same_requests).limit_s(120),
    test!(a_quick_run_leaves_a_document_with_every_sample).limit_s(240),
    test!(the_mixed_lane_notes_how_long_requests_take).limit_s(240),
    test!(the_ring_lane_counts_what_its_two_ends_did).limit_s(240),
    test!(fio_understands_the_job_files),
    test!(a_request_costs_no_more_than_on_the_last_landed_tree).limit_s(600),
    test!(a_request_that_costs_more_is_noticed).limit_s(240),
];

fn a_request_costs_no_more_than_on_the_last_landed_tree(cx: &Context) -> Result<()> {
    let product = cx
        .paths
        .product
        .as_deref()
        .context("the product was not built")?;
    guard::check(&cx.paths.repo, product)
}

fn a_request_that_costs_more_is_noticed(cx: &Context) -> Result<()> {
    let noticed = guard::check_is_noticed(&cx.paths.server)?;
    for figure in [
        "spend: instructions",
        "spend: system-calls",
        "spend: allocations",
        "delay1: sleeps",
    ] {
        ensure!(
            noticed.iter().any(|one| one == figure),
            "{figure} are not in {noticed:?}"
        );
    }
    ensure!(
        !noticed.iter().any(|one| one == "spend: sleeps"),
        "{noticed:?}"
    );
    Ok(())
}

fn the_client_and_the_server_count_the_same_requests(cx: &Context) -> Result<()> {
    let socket = cx.scratch().join("s");
    let server = cx
        .serve()
        .ublk("no")
        .name("disk")
        .vhost_socket(&socket)
        .arg("mem:16M")
        .start()?;
    let order = |op, waiting, depth| Order {
        op,
        depth,
        waiting,
        warm_up: End::Requests(100),
        ..Order::reads(&socket, server.pid(), End::Requests(2_000))
    };
    let (mut reads, mut writes) = (0, 0);
    for waiting in [Waiting::Sleeps, Waiting::Polls] {
        for depth in [1, 32, 128] {
            for op in [Op::RandRead, Op::RandWrite, Op::Read] {
                let answer = Client::start(&order(op, waiting, depth))?
                    .finish()
                    .with_context(|| format!("{op:?}, {waiting:?}, depth {depth}"))?;
                ensure!(answer.requests >= 2_000, "{answer:?}");
                match op {
                    Op::RandRead | Op::Read => reads += answer.all_requests,
                    Op::RandWrite => writes += answer.all_requests,
                    Op::Mixed => {}
                }
            }
        }
    }
    let stat = cx.stat("disk")?;
    let counters = &stat["vhost"]["counters"];
    let served = (counters["reads"].as_u64(), counters["writes"].as_u64());
    ensure!(
        served == (Some(reads), Some(writes)),
        "the clients count {reads} reads and {writes} writes, the server {counters}"
    );
    server.stop().map(drop)
}

fn a_quick_run_leaves_a_document_with_every_sample(cx: &Context) -> Result<()> {
    let output = cx.scratch().join("bench");
    let server = cx.paths.server.to_str().context("a path that is no text")?;
    let printed = Shell::new("/proc/self/exe")
        .args(["bench", "native", "--quick", "--rounds", "3", "--no-counts"])
        .args(["--only", "null.*depth 32", "--server", server, "--json"])
        .args(["--client-cpu", "0", "--server-cpu", "0", "--output"])
        .arg(&output)
        .limit(cx.patience(200))
        .run()?;
    let document: Document = serde_json::from_str(&printed).context("no document was printed")?;
    let kept = fs::read_to_string(output.join("bench.json")).context("no document was kept")?;
    ensure!(
        kept.trim() == printed.trim(),
        "another document was kept than printed"
    );
    ensure!(document.rows.len() == 2, "{} rows", document.rows.len());
    for row in &document.rows {
        let names: Vec<&str> = row.candidates.iter().map(|one| one.name.as_str()).collect();
        for wanted in ["ublkup", "ublkup --poll-us always", "qemu-storage-daemon"] {
            ensure!(names.contains(&wanted), "no {wanted} in {names:?}");
        }
        for one in &row.candidates {
            ensure!(one.iops.samples.len() == 3 && one.iops.min > 0.0, "{one:?}");
        }
    }
    ensure!(!document.goals.is_empty(), "no goal is mentioned");
    let table = fs::read_to_string(output.join("bench.md")).context("no table was kept")?;
    ensure!(table.contains("| qemu-storage-daemon |"), "{table}");
    Ok(())
}

fn the_mixed_lane_notes_how_long_requests_take(cx: &Context) -> Result<()> {
    let output = cx.scratch().join("bench");
    let server = cx.paths.server.to_str().context("a path that is no text")?;
    let printed = Shell::new("/proc/self/exe")
        .args(["bench", "mixed", "--quick", "--no-counts", "--json"])
        .args(["--only", "vhost-user, file, tmpfs", "--server", server])
        .args(["--client-cpu", "0", "--server-cpu", "0", "--output"])
        .arg(&output)
        .limit(cx.patience(200))
        .run()?;
    let document: Document = serde_json::from_str(&printed).context("no document was printed")?;
    let [row] = &document.rows[..] else {
        anyhow::bail!("{} rows", document.rows.len());
    };
    ensure!(row.candidates.len() == 5, "{row:?}");
    for one in &row.candidates {
        let times = one.latency_us.as_ref();
        let times = times.with_context(|| format!("no times of {}", one.name))?;
        let (half, tail, last) = (&times.p50, &times.p99, &times.p99_9);
        ensure!(half.samples.len() == 2 && half.min > 0.0, "{one:?}");
        let rounds = half.samples.iter().zip(&tail.samples).zip(&last.samples);
        for ((half, tail), last) in rounds {
            ensure!(half <= tail && tail <= last, "{one:?}");
        }
    }
    let table = fs::read_to_string(output.join("bench.md")).context("no table was kept")?;
    ensure!(table.contains("| p99.9 µs |"), "{table}");
    // What the client asks for is what the server counts.
    let socket = cx.scratch().join("s");
    let file = cx.file(16 << 20)?;
    let server = (cx.serve().ublk("no").name("disk"))
        .vhost_socket(&socket)
        .arg(file)
        .start()?;
    let order = Order {
        op: Op::Mixed,
        depth: 8,
        ..Order::reads(&socket, server.pid(), End::Requests(4_000))
    };
    let answer = Client::start(&order)?.finish()?;
    let stat = cx.stat("disk")?;
    let counted = |name: &str| stat["vhost"]["counters"][name].as_u64().unwrap_or(0);
    let [reads, writes, flushes] = ["reads", "writes", "flushes"].map(counted);
    ensure!(reads + writes + flushes == answer.all_requests, "{stat}");
    ensure!(
        writes / 32 - flushes <= 1,
        "{writes} writes, {flushes} flushes"
    );
    let share = writes as f64 / (reads + writes) as f64;
    ensure!((0.25..0.35).contains(&share), "{share} of them are writes");
    server.stop().map(drop)
}

fn the_ring_lane_counts_what_its_two_ends_did(cx: &Context) -> Result<()> {
    let output = cx.scratch().join("bench");
    let printed = Shell::new("/proc/self/exe")
        .args(["bench", "ring", "--quick", "--no-counts", "--json"])
        .args(["--only", "natively: (16|4096) bytes", "--client-cpu", "0"])
        .args(["--server-cpu", "0", "--output"])
        .arg(&output)
        .limit(cx.patience(200))
        .run()?;
    let document: Document = serde_json::from_str(&printed).context("no document was printed")?;
    ensure!(document.rows.len() == 3, "{} rows", document.rows.len());
    for row in &document.rows {
        let calls = |name| row.candidate(name).and_then(|one| one.syscalls_per_io);
        let pipe = calls(ring::PIPE).context("no pipe")?;
        let shared = calls(ring::SHARED).context("no shared ring")?;
        let to_and_fro = row.title.starts_with("ping-pong");
        // One read and one write for each record each way; a ring needs them only to sleep and to wake.
        let least = if to_and_fro { 4.0 } else { 2.0 };
        ensure!((pipe - least).abs() < 0.1, "{pipe} system calls in {row:?}");
        ensure!(
            to_and_fro || shared < pipe,
            "{shared} system calls in {row:?}"
        );
        for one in &row.candidates {
            ensure!(one.iops.samples.len() == 2 && one.iops.min > 0.0, "{one:?}");
        }
    }
    let goal = document.goals.first().context("no goal is mentioned")?;
    ensure!(
        goal.goal == ">= 7" && goal.what.contains(ring::SHARED),
        "{goal:?}"
    );
    Ok(())
}

fn fio_understands_the_job_files(cx: &Context) -> Result<()> {
    let engines = Shell::new("fio").arg("--enghelp").run()?;
    let jobs = cx.paths.repo.join("tests/bench/jobs");
    let mut seen = 0;
    for entry in fs::read_dir(&jobs).context("there are no job files")? {
        let path = entry.context("cannot list the job files")?.path();
        let mut text = fs::read_to_string(&path).context("cannot read a job file")?;
        if text.contains("ioengine=libblkio") && !engines.contains("libblkio") {
            // A fio without that engine knows all the rest of the file.
            let rest = text.lines().filter(|line| !line.starts_with("libblkio_"));
            text = rest.collect::<Vec<_>>().join("\n");
            text = text.replace("ioengine=libblkio", "ioengine=null");
        }
        parse(cx, &text).with_context(|| path.display().to_string())?;
        ensure!(
            parse(cx, &text.replace("runtime=20s", "runtime=soon")).is_err(),
            "fio takes anything in {}",
            path.display()
        );
        seen += 1;
    }
    ensure!(seen == 3, "{seen} job files");
    Ok(())
}

fn parse(cx: &Context, job: &str) -> Result<()> {
    let path = cx.scratch().join("job.fio");
    fs::write(&path, job).context("cannot write a job file")?;
    let mut fio = Shell::new("fio").arg("--parse-only").arg(&path);
    let words = [
        ("DISK", "/dev/null"),
        ("SOCKET", "/nowhere"),
        ("RW", "randread"),
        ("DEPTH", "32"),
        ("JOBS", "1"),
        ("CPU", "0"),
        ("WAIT", "block"),
    ];
    for (name, value) in words {
        fio = fio.env(name, value);
    }
    fio.dir(Path::new("/")).run().map(drop)
}
