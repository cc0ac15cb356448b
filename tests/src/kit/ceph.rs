//! A Ceph cluster on this machine: a monitor and a storage daemon in memory, from the packages of this release, on the
//! loopback device. Nothing is installed, and no root is needed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use testkit::process;
use testkit::shell::{Shell, last_lines};

use crate::packages::apt;
use crate::packages::unpacked::CEPH;
use crate::skip;
use crate::test::Context;

const FSID: &str = "6f2d1c1e-0000-4000-8000-000000000001";
const OSD: &str = "6f2d1c1e-0000-4000-8000-0000000000a0";

/// A running cluster with a pool `rbd`. Its daemons end with the value.
pub struct Cluster {
    /// The directory with everything of it: `ceph.conf`, keys, logs, `osd.0.pid`.
    pub dir: PathBuf,
    env: Vec<(&'static str, OsString)>,
    daemons: Vec<Child>,
}

impl Cluster {
    /// Makes a cluster and starts it. Skips the test where there are no packages.
    pub fn start(cx: &Context) -> Result<Self> {
        if apt::codename().is_none() {
            skip!("Ceph comes from Debian's packages, and this is not Debian");
        }
        let packages = match cx.paths.ceph.clone().map_or_else(|| CEPH.dir(), Ok) {
            Ok(packages) => packages,
            Err(error) => skip!("{error:#}"),
        };
        let dir = cx.scratch().join("ceph");
        for part in ["mon", "osd0"] {
            fs::create_dir_all(dir.join(part))?;
        }
        // Free now; nothing else takes ports one after another.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        fs::write(dir.join("ceph.conf"), configuration(&dir, &packages, port))?;
        let mut cluster = Self {
            env: environment(&dir, &packages),
            dir,
            daemons: Vec::new(),
        };
        let made = cluster.make(cx, port);
        made.with_context(|| cluster.logs())?;
        Ok(cluster)
    }

    /// A program that finds the cluster and its packages.
    pub fn shell(&self, program: &str) -> Shell {
        let shell = Shell::new(program);
        (self.env.iter()).fold(shell, |shell, (name, value)| shell.env(name, value))
    }

    /// What programs find the cluster and its packages by.
    pub fn env(&self) -> impl Iterator<Item = (&str, &str)> {
        let all = self.env.iter();
        all.filter_map(|(name, value)| Some((*name, value.to_str()?)))
    }

    fn run(&self, cx: &Context, words: &[&str]) -> Result<String> {
        let shell = self.shell(words[0]).args(&words[1..]);
        shell.limit(cx.patience(60)).run()
    }

    fn make(&mut self, cx: &Context, port: u16) -> Result<()> {
        let path = |name: &str| self.dir.join(name).display().to_string();
        let (keyring, map, osd_keyring) = (path("keyring"), path("monmap"), path("osd0/keyring"));
        let new_key = ["--gen-key", "-n"];
        let mut first = vec!["ceph-authtool", "-C", &keyring];
        first.extend(new_key);
        self.run(
            cx,
            &[&first[..], &["mon.", "--cap", "mon", "allow *"]].concat(),
        )?;
        let mut admin = vec!["ceph-authtool", &keyring];
        admin.extend(new_key);
        admin.push("client.admin");
        for service in ["mon", "osd"] {
            admin.extend(["--cap", service, "allow *"]);
        }
        self.run(cx, &admin)?;
        let address = format!("[v2:127.0.0.1:{port}/0]");
        self.run(
            cx,
            &[
                "monmaptool",
                "--create",
                "--fsid",
                FSID,
                "--addv",
                "a",
                &address,
                &map,
            ],
        )?;
        let monitor = ["-i", "a", "--monmap", &map, "--keyring", &keyring];
        self.run(cx, &[&["ceph-mon", "--mkfs"][..], &monitor].concat())?;
        let monitor = self.spawn("ceph-mon", &["-i", "a"])?;
        self.daemons.push(monitor);

        self.run(
            cx,
            &[
                "ceph-authtool",
                "-C",
                &osd_keyring,
                "--gen-key",
                "-n",
                "osd.0",
            ],
        )?;
        let key = self.run(cx, &["ceph-authtool", "-p", "-n", "osd.0", &osd_keyring])?;
        let secret = serde_json::json!({ "cephx_secret": key.trim() });
        self.shell("ceph")
            .args(["osd", "new", OSD, "-i", "-"])
            .input(secret.to_string())
            .limit(cx.patience(60))
            .run()?;
        let osd = ["-i", "0", "--keyring", &osd_keyring];
        self.run(
            cx,
            &[&["ceph-osd", "--mkfs", "--osd-uuid", OSD][..], &osd].concat(),
        )?;
        let osd = self.spawn("ceph-osd", &osd)?;
        fs::write(self.dir.join("osd.0.pid"), osd.id().to_string())?;
        self.daemons.push(osd);

        for words in [
            "ceph osd pool create rbd 8 8",
            "ceph osd pool application enable rbd rbd",
            // The first write waits until the storage daemon is up.
            "rbd create --size 1M ready",
            "rbd rm --no-progress ready",
        ] {
            self.run(cx, &words.split(' ').collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Starts a daemon, which ends with this thread.
    fn spawn(&self, program: &str, args: &[&str]) -> Result<Child> {
        let log = File::create(self.dir.join(format!("{program}.out")))?;
        let mut command = Command::new(program);
        command
            .arg("-f")
            .args(args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        process::spawn_bound(&mut command)
    }

    fn logs(&self) -> String {
        let log = |name| {
            let text = fs::read_to_string(self.dir.join(name)).unwrap_or_default();
            format!("{name}:\n{}\n", last_lines(&text, 10))
        };
        ["ceph-mon.out", "mon.a.log", "ceph-osd.out", "osd.0.log"]
            .map(log)
            .concat()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for daemon in &mut self.daemons {
            // One that has ended is gone already. It may be stopped, which this ends too.
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// Where the libraries of a Debian package are.
fn libraries(packages: &Path) -> PathBuf {
    packages.join("usr/lib/x86_64-linux-gnu")
}

fn environment(dir: &Path, packages: &Path) -> Vec<(&'static str, OsString)> {
    let usr = packages.join("usr");
    let paths = |first: &[PathBuf], variable| {
        let others = std::env::var_os(variable).unwrap_or_default();
        let others: Vec<_> = std::env::split_paths(&others).collect();
        std::env::join_paths(first.iter().chain(&others)).unwrap_or_default()
    };
    let libraries = libraries(packages);
    vec![
        ("PATH", paths(&[usr.join("bin"), usr.join("sbin")], "PATH")),
        (
            "LD_LIBRARY_PATH",
            paths(&[libraries.join("ceph"), libraries], "LD_LIBRARY_PATH"),
        ),
        ("PYTHONPATH", usr.join("lib/python3/dist-packages").into()),
        ("CEPH_CONF", dir.join("ceph.conf").into()),
        ("CEPH_INCLUDE", usr.join("include").into()),
        ("LC_ALL", "C".into()),
    ]
}

fn configuration(dir: &Path, packages: &Path, port: u16) -> String {
    let (at, libraries) = (dir.display(), libraries(packages));
    // Where they are installed, Ceph looks there by itself.
    let plugins = [
        ("osd_class_dir", libraries.join("rados-classes")),
        ("erasure_code_dir", libraries.join("ceph/erasure-code")),
        ("plugin_dir", libraries.join("ceph")),
    ];
    let plugins: String = (plugins.iter())
        .filter(|(_, path)| path.exists())
        .map(|(option, path)| format!("{option} = {}\n", path.display()))
        .collect();
    format!(
        "\
[global]
fsid = {FSID}
mon_host = v2:127.0.0.1:{port}/0
public_network = 127.0.0.0/8
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {at}/keyring
run_dir = {at}
pid_file =
admin_socket =
log_file = {at}/$name.log
crash_dir = {at}
{plugins}
# One copy, on one host.
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 2
mon_data_avail_crit = 1
# A pool without copies stays unreadable when its daemon was stopped for longer than this (times 20 s).
osd_pool_default_read_lease_ratio = 100
[mon.a]
mon_data = {at}/mon
mon_cluster_log_file = {at}/cluster.log
[osd]
osd_data = {at}/osd$id
osd_objectstore = memstore
memstore_device_bytes = 2G
osd_mclock_skip_benchmark = true
# How soon a client that has died is given up.
osd_client_watch_timeout = 10
[client]
log_file = {at}/client.log
"
    )
}
