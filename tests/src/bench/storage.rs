//! Storages that are other servers: an image of Ceph and a disk of a vhost-user server, each by ublkup and by others.
//!
//! Servers and cluster run where the kernel puts them: with two processors there is none for each.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use testkit::proc;
use testkit::server::{Serve, Server};

use super::Settings;
use super::attach::Client;
use super::client::{Answer, End, Op, Order};
use super::figures::Samples;
use super::record::{Candidate, Document, Row};
use crate::kit::ceph::Cluster;
use crate::kit::fio::Fio;
use crate::test::{Context, Paths};

/// The lane's name.
pub const LANE: &str = "storage";

const DISK_BYTES: u64 = 1 << 30;
const DEPTH: usize = 32;
const OURS: &str = "ublkup";
const QEMU: &str = "qemu-storage-daemon";
const FIO: &str = "fio's rbd engine";

/// How long a server may take until it listens.
const PATIENCE: Duration = Duration::from_secs(30);

const OPS: [(Op, &str, &str); 2] = [
    (Op::RandRead, "randread", "4 KiB random reads"),
    (Op::RandWrite, "randwrite", "4 KiB random writes"),
];

/// Measures.
pub fn run(settings: &Settings, document: &mut Document) -> Result<()> {
    for (op, _, words) in OPS {
        let title = format!("vhost-user, null disk of {QEMU}: {words}");
        measure(settings, document, &title, &[OURS, QEMU], |who| {
            behind_vhost_user(settings, who, op)
        })?;
    }
    let titles = OPS.map(|(op, fio, words)| (op, fio, format!("rbd: {words}")));
    let is_wanted = |title: &str| settings.wants(LANE, title, &load());
    if !titles.iter().any(|(_, _, title)| is_wanted(title)) {
        return Ok(());
    }
    let paths = Paths {
        server: settings.server()?.to_owned(),
        ..Paths::default()
    };
    let (_folder, cx) = Context::on_host(paths)?;
    let cluster = Cluster::start(&cx).context("no cluster to measure with")?;
    let size = format!("{DISK_BYTES}B");
    let create = ["create", "--size", &size, "bench"];
    cluster.shell("rbd").args(create).run()?;
    on_image(&cluster, "write")
        .option("bs", "1M")
        .depth(8)
        .run()
        .context("cannot fill the image")?;
    for (op, fio, title) in titles {
        measure(settings, document, &title, &[OURS, QEMU, FIO], |who| {
            in_ceph(settings, &cluster, who, op, fio)
        })?;
    }
    Ok(())
}

fn load() -> String {
    format!("depth {DEPTH}, client sleeps")
}

fn measure(
    settings: &Settings,
    document: &mut Document,
    title: &str,
    names: &[&str],
    mut once: impl FnMut(&str) -> Result<Answer>,
) -> Result<()> {
    if !settings.wants(LANE, title, &load()) {
        return Ok(());
    }
    let names = match settings.no_peers {
        true => &names[..1],
        false => names,
    };
    let found = settings.interleaved(names.len(), |index| {
        let answer = once(names[index]).with_context(|| format!("{title}: {}", names[index]));
        answer.map(Some)
    })?;
    let candidate = |(name, found): (&&str, &Vec<Answer>)| -> Result<Candidate> {
        let counted = || found.iter().all(|one| one.requests > 0);
        Ok(Candidate {
            name: (*name).to_owned(),
            iops: Samples::of_each(found, |one| one.iops).context("no round was measured")?,
            cpu_us_per_io: Samples::of_each(found, |one| {
                one.server.cpu_ns as f64 / 1e3 / one.requests as f64
            })
            .filter(|_| counted()),
            waits_per_io: Samples::of_each(found, |one| {
                one.server.waits as f64 / one.requests as f64
            })
            .filter(|_| counted()),
            ..Candidate::default()
        })
    };
    let row = Row {
        lane: LANE.to_owned(),
        title: title.to_owned(),
        load: load(),
        candidates: names
            .iter()
            .zip(&found)
            .map(candidate)
            .collect::<Result<_>>()?,
    };
    document.keep(row);
    Ok(())
}

/// A server's disk, or ours in front of it. Of two servers the processor time of ours is counted.
fn behind_vhost_user(settings: &Settings, who: &str, op: Op) -> Result<Answer> {
    let peer_socket = settings.scratch.path().join("peer.sock");
    let node = format!("driver=null-co,node-name=n0,size={DISK_BYTES},read-zeroes=off");
    let peer = qemu(&node, &peer_socket, |_| {})?;
    if who == QEMU {
        return attach(settings, peer, &peer_socket, op);
    }
    let socket = settings.scratch.path().join("bench.sock");
    let spec = format!("vhost-user:{}", peer_socket.display());
    let answer = attach(
        settings,
        ours(settings)?.vhost_socket(&socket).arg(spec).start()?,
        &socket,
        op,
    )?;
    peer.stop()?;
    Ok(answer)
}

fn in_ceph(settings: &Settings, cluster: &Cluster, who: &str, op: Op, fio: &str) -> Result<Answer> {
    let socket = settings.scratch.path().join("bench.sock");
    let server = match who {
        OURS => {
            let serve = ours(settings)?.vhost_socket(&socket).arg("rbd:rbd/bench");
            let set = |serve: Serve, (name, value): (&str, &str)| serve.env(name, value);
            cluster.env().fold(serve, set).start()?
        }
        QEMU => {
            let conf = cluster.dir.join("ceph.conf");
            let node = format!(
                "driver=rbd,node-name=n0,pool=rbd,image=bench,conf={}",
                conf.display()
            );
            qemu(&node, &socket, |command| {
                command.envs(cluster.env());
            })?
        }
        _ => {
            let ms = settings.window_ms;
            let job = on_image(cluster, fio)
                .depth(u32::try_from(DEPTH)?)
                .option("time_based", 1)
                .option("ramp_time", format!("{}ms", ms / 5))
                .option("runtime", format!("{ms}ms"));
            return Ok(Answer {
                iops: job.run()?.iops(),
                ..Answer::default()
            });
        }
    };
    attach(settings, server, &socket, op)
}

/// fio in place of a server.
fn on_image(cluster: &Cluster, rw: &str) -> Fio {
    let job = Fio::new(Path::new("bench"))
        .option("ioengine", "rbd")
        .option("clientname", "admin")
        .option("pool", "rbd")
        .option("rbdname", "bench")
        .option("size", DISK_BYTES)
        .option("rw", rw);
    cluster
        .env()
        .fold(job, |job, (name, value)| job.env(name, value))
}

fn ours(settings: &Settings) -> Result<Serve> {
    let serve = Serve::new(settings.server()?, PATIENCE)
        .env("UBLKUP_RUNTIME_DIR", settings.scratch.path().join("run"))
        .ublk("no")
        .name("bench")
        .args(["--queues", "1"]);
    Ok(serve)
}

fn qemu(node: &str, socket: &Path, prepare: impl FnOnce(&mut Command)) -> Result<Server> {
    // A socket that is left over would look like one that listens.
    let _none = std::fs::remove_file(socket);
    let mut command = Command::new(QEMU);
    command
        .args(["--object", "iothread,id=io0", "--blockdev", node, "--export"])
        .arg(format!(
            "type=vhost-user-blk,id=e0,node-name=n0,addr.type=unix,addr.path={},writable=on,num-queues=1,iothread=io0",
            socket.display()
        ))
        .stdin(Stdio::null());
    prepare(&mut command);
    testkit::process::bind(&mut command);
    Server::launch(&mut command, PATIENCE)?.ready_when(|_| proc::is_listened_on(socket))
}

/// Loads a server, and stops it.
fn attach(settings: &Settings, server: Server, socket: &Path, op: Op) -> Result<Answer> {
    let order = Order {
        op,
        depth: DEPTH,
        cpu: settings.client_cpu,
        warm_up: End::Milliseconds((settings.window_ms / 5).max(50)),
        ..Order::reads(socket, server.pid(), End::Milliseconds(settings.window_ms))
    };
    let answer = Client::start(&order)?.finish()?;
    server.stop()?;
    Ok(answer)
}
