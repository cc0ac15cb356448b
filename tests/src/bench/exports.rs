//! Many exports in one process: what they cost while nothing happens, and how fairly busy ones
//! share two processors.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::server::Server;

use super::Settings;
use super::attach::Client;
use super::client::{End, Op, Order, Waiting};
use super::figures::Samples;
use super::record::{Candidate, Measure, Row};
use super::usage::{Usage, field};
use crate::test::{Context, Paths, Place};

/// The lane's name.
pub const LANE: &str = "exports";

const IDLE: usize = 64;
const BUSY: usize = 8;

/// For how long idle exports are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Measures.
///
/// # Errors
/// The server or a client failed.
pub fn run(
    settings: &Settings,
    row: &mut dyn FnMut(Row),
    measure: &mut dyn FnMut(Measure),
) -> Result<()> {
    if settings.wants(LANE, "idle", "") {
        idle(settings, measure)?;
    }
    if settings.wants(LANE, "busy", "") {
        busy(settings, row, measure)?;
    }
    Ok(())
}

/// The folder of a server's sockets.
fn runtime_dir(settings: &Settings) -> PathBuf {
    settings.scratch.path().join("run")
}

fn serve(settings: &Settings, exports: usize) -> Result<Server> {
    let paths = Paths {
        server: settings.server()?.to_owned(),
        ..Paths::default()
    };
    let scratch = settings.scratch.path().to_owned();
    let nothing = serde_json::Value::Null;
    let cx = Context::new(Place::Host, paths, scratch.clone(), scratch, nothing);
    let specs = (0..exports).map(|index| format!("e{index}=null:1G"));
    cx.serve()
        .under(["taskset", "-c", &processors(settings)])
        .env("UBLKUP_RUNTIME_DIR", runtime_dir(settings))
        .ublk("no")
        .args(["--queues", "1"])
        .args(specs)
        .start()
}

/// Both processors, as taskset wants them.
fn processors(settings: &Settings) -> String {
    format!("{},{}", settings.client_cpu, settings.server_cpu)
}

fn order(settings: &Settings, server: &Server, export: usize) -> Order {
    let folder = runtime_dir(settings).join("exports");
    Order {
        socket: folder.join(format!("e{export}")).join("vhost-user-blk"),
        upgrades: false,
        op: Op::RandRead,
        block_bytes: 4096,
        depth: 1,
        waiting: Waiting::Sleeps,
        cpu: [settings.client_cpu, settings.server_cpu][export % 2],
        warm_up: End::Milliseconds(50),
        window: End::Milliseconds(50),
        server: server.pid(),
        hold_ms: 0,
    }
}

/// Memory and threads of a process.
fn size(pid: u32) -> Result<(f64, f64)> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let rss_kib = field(&status, "VmRSS:").context("a process without memory")?;
    let threads = field(&status, "Threads:").context("a process without threads")?;
    Ok((rss_kib as f64, threads as f64))
}

/// Exports without clients, then with clients that are connected and have nothing to do.
fn idle(settings: &Settings, measure: &mut dyn FnMut(Measure)) -> Result<()> {
    let one = serve(settings, 1)?;
    let alone = size(one.pid())?;
    one.stop()?;
    let server = serve(settings, IDLE)?;
    report(settings, &server, "without clients", alone, measure)?;
    server.stop()?;

    let look_ms = u64::try_from(look(settings).as_millis())?;
    let connect = |server: &Server, count: usize| -> Result<Vec<Client>> {
        (0..count)
            .map(|export| {
                let mut order = order(settings, server, export);
                // Until the last client is there, and has been looked at.
                order.hold_ms = 8_000 + look_ms;
                Client::start(&order)
            })
            .collect()
    };
    let settle = || std::thread::sleep(Duration::from_secs(6));
    let one = serve(settings, 1)?;
    let clients = connect(&one, 1)?;
    settle();
    let alone = size(one.pid())?;
    // Nothing more is wanted from it; it goes with its server.
    drop((clients, one));
    let server = serve(settings, IDLE)?;
    let clients = connect(&server, IDLE)?;
    settle();
    report(settings, &server, "with idle clients", alone, measure)?;
    for client in clients {
        client.finish()?;
    }
    server.stop()?;
    Ok(())
}

fn look(settings: &Settings) -> Duration {
    if settings.quick {
        Duration::from_secs(1)
    } else {
        LOOK
    }
}

fn report(
    settings: &Settings,
    server: &Server,
    how: &str,
    alone: (f64, f64),
    measure: &mut dyn FnMut(Measure),
) -> Result<()> {
    let before = (Usage::of(server.pid())?, Instant::now());
    std::thread::sleep(look(settings));
    let used = Usage::of(server.pid())?.since(before.0);
    let elapsed_ns = before.1.elapsed().as_nanos() as f64;
    let (rss_kib, threads) = size(server.pid())?;
    let others = (IDLE - 1) as f64;
    for (what, unit, value) in [
        ("CPU", "% of one", used.cpu_ns as f64 / elapsed_ns * 100.0),
        (
            "memory for each beyond the first",
            "MiB",
            (rss_kib - alone.0).max(0.0) / 1024.0 / others,
        ),
        (
            "threads for each beyond the first",
            "",
            (threads - alone.1) / others,
        ),
    ] {
        measure(Measure {
            lane: LANE.to_owned(),
            what: format!("{IDLE} exports {how}: {what}"),
            unit: unit.to_owned(),
            value: Samples::of(&[value]).context("there is a sample")?,
        });
    }
    Ok(())
}

/// As many clients as exports, all on the two processors that the server has too.
fn busy(
    settings: &Settings,
    row: &mut dyn FnMut(Row),
    measure: &mut dyn FnMut(Measure),
) -> Result<()> {
    let mut iops: Vec<Vec<f64>> = vec![Vec::new(); BUSY];
    let mut least = Vec::new();
    for _ in 0..settings.rounds {
        let server = serve(settings, BUSY)?;
        let clients: Vec<Client> = (0..BUSY)
            .map(|export| {
                let mut order = order(settings, &server, export);
                order.depth = 32;
                order.warm_up = End::Milliseconds(500);
                order.window = End::Milliseconds(settings.window_ms * 2);
                Client::start(&order)
            })
            .collect::<Result<_>>()?;
        let mut round = Vec::new();
        for (client, iops) in clients.into_iter().zip(&mut iops) {
            let answer = client.finish()?;
            round.push(answer.iops);
            iops.push(answer.iops);
        }
        let mean = round.iter().sum::<f64>() / BUSY as f64;
        ensure!(mean > 0.0, "no export did anything");
        least.push(round.iter().copied().fold(f64::INFINITY, f64::min) / mean);
        server.stop()?;
    }
    row(Row {
        lane: LANE.to_owned(),
        title: format!("{BUSY} busy null exports on two processors, their clients on the same"),
        load: "depth 32, clients sleep".to_owned(),
        candidates: iops
            .iter()
            .enumerate()
            .map(|(export, iops)| {
                Ok(Candidate {
                    name: format!("export {export}"),
                    iops: Samples::of(iops).context("no round was measured")?,
                    ..Candidate::default()
                })
            })
            .collect::<Result<_>>()?,
    });
    measure(Measure {
        lane: LANE.to_owned(),
        what: format!("{BUSY} busy exports: the least share, of the mean"),
        unit: String::new(),
        value: Samples::of(&least).context("no round was measured")?,
    });
    Ok(())
}
