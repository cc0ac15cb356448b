//! Many exports in one process: what they cost while nothing happens, and how fairly busy ones
//! share two processors.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use testkit::proc::Holdings;
use testkit::server::Server;

use super::Settings;
use super::attach::Client;
use super::client::{End, Order};
use super::figures::Samples;
use super::record::{Candidate, Document, Row};
use super::usage::Usage;
use crate::test::{Context, Paths, Place};

/// The lane's name.
pub const LANE: &str = "exports";

const IDLE: usize = 64;
const BUSY: usize = 8;

/// For how long idle exports are looked at.
const LOOK: Duration = Duration::from_secs(10);

/// Measures.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    if settings.wants(LANE, "idle", "") {
        idle(settings, document)?;
    }
    if settings.wants(LANE, "busy", "") {
        busy(settings, document)?;
    }
    Ok(())
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
    let exports = settings.scratch.path().join("run/exports");
    let socket = exports.join(format!("e{export}/vhost-user-blk"));
    let window = End::Milliseconds(50);
    Order {
        cpu: [settings.client_cpu, settings.server_cpu][export % 2],
        warm_up: window,
        ..Order::reads(&socket, server.pid(), window)
    }
}

/// Memory in MiB and threads of a process.
fn size(pid: u32) -> Result<(f64, f64)> {
    let held = Holdings::of(pid)?;
    Ok((held.resident_kib as f64 / 1024.0, held.threads as f64))
}

/// Exports without clients, then with clients that are connected and have nothing to do.
fn idle(settings: &Settings, document: &mut Document) -> Result<()> {
    let one = serve(settings, 1)?;
    let alone = size(one.pid())?;
    one.stop()?;
    let server = serve(settings, IDLE)?;
    report(settings, &server, "without clients", alone, document)?;
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
    report(settings, &server, "with idle clients", alone, document)?;
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
    document: &mut Document,
) -> Result<()> {
    let before = (Usage::of(server.pid())?, Instant::now());
    std::thread::sleep(look(settings));
    let used = Usage::of(server.pid())?.since(before.0);
    let elapsed_ns = before.1.elapsed().as_nanos() as f64;
    let (rss_mib, threads) = size(server.pid())?;
    let others = (IDLE - 1) as f64;
    let cpu = used.cpu_ns as f64 / elapsed_ns * 100.0;
    let memory = (rss_mib - alone.0).max(0.0) / others;
    for (what, unit, value) in [
        ("CPU", "% of one", cpu),
        ("memory for each beyond the first", "MiB", memory),
        (
            "threads for each beyond the first",
            "",
            (threads - alone.1) / others,
        ),
    ] {
        let what = format!("{IDLE} exports {how}: {what}");
        document.measure(LANE, &what, unit, &[value]);
    }
    Ok(())
}

/// As many clients as exports, all on the two processors that the server has too.
fn busy(settings: &Settings, document: &mut Document) -> Result<()> {
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
    document.keep(Row {
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
    let what = format!("{BUSY} busy exports: the least share, of the mean");
    document.measure(LANE, &what, "", &least);
    Ok(())
}
