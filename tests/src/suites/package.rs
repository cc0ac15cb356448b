//! What is packaged: units that systemd takes, packages that come and go without a trace.

mod boots;
mod tree;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Result, ensure};
use testkit::shell::{Finished, Shell, sh};
use testkit::vhost::{Driver, OK, USUAL};

use crate::package::{self, Packages};
use crate::test;
use crate::test::{Context, Test};
use tree::{Kind, Tree};

/// Short ones.
pub const UNITS: &[Test] = &[test!(systemd_takes_the_units_and_finds_them_confined)];

/// The table.
pub const TESTS: &[Test] = &[
    test!(
        the_package_comes_and_goes_in_debian_12,
        |cx| comes_and_goes(cx, "bookworm")
    )
    .limit_s(1800),
    test!(
        the_package_comes_and_goes_in_debian_13,
        |cx| comes_and_goes(cx, "trixie")
    )
    .limit_s(1800),
    test!(the_package_of_red_hats_kin_has_what_debians_has).limit_s(900),
    test!(debian_12_boots_and_shuts_down_with_a_disk_in_use, |cx| {
        boots::ten_times(cx, "bookworm")
    })
    .limit_s(3600),
    test!(debian_13_boots_and_shuts_down_with_a_disk_in_use, |cx| {
        boots::ten_times(cx, "trixie")
    })
    .limit_s(3600),
];

/// Ten times the exposure that `systemd-analyze security` may find: 0 is none, 10 that of a plain service of root.
const MOST_EXPOSURE: &str = "39";

fn systemd_takes_the_units_and_finds_them_confined(cx: &Context) -> Result<()> {
    let root = cx.scratch().join("root");
    let units = root.join("usr/lib/systemd/system");
    fs::create_dir_all(&units)?;
    for program in ["usr/bin/ublkup", "usr/lib/ublkup/service-stop"] {
        let path = root.join(program);
        fs::create_dir_all(path.parent().context("it is in a folder")?)?;
        fs::copy("/bin/true", path)?;
    }
    let sources = cx.paths.repo.join("server/package/systemd");
    for unit in ["ublkup.service", "ublkup@.service", "ublkup@.socket"] {
        fs::copy(sources.join(unit), units.join(unit))?;
    }
    // systemd's own, which these refer to.
    for entry in fs::read_dir("/usr/lib/systemd/system")?.flatten() {
        if entry.file_type()?.is_file() {
            fs::copy(entry.path(), units.join(entry.file_name()))?;
        }
    }
    let analyze = |words: &[&str], units: &[&str]| {
        Shell::new("systemd-analyze")
            .args(words)
            .arg(format!("--root={}", root.display()))
            .args(units)
            .finish()
    };
    let services = ["ublkup.service", "ublkup@x.service"];
    let all = [&services[..], &["ublkup@x.socket"]].concat();
    let Finished { stderr, status, .. } = analyze(&["verify", "--man=no"], &all)?;
    ensure!(status.success() && stderr.trim().is_empty(), "{stderr}");
    let threshold = format!("--threshold={MOST_EXPOSURE}");
    let found = analyze(
        &["security", "--no-pager", "--offline=true", &threshold],
        &services,
    )?;
    ensure!(found.status.success(), "{}{}", found.stdout, found.stderr);
    Ok(())
}

fn comes_and_goes(cx: &Context, suite: &str) -> Result<()> {
    let Packages { deb: first, .. } = package::build(&cx.paths.repo, 1)?;
    let Packages { deb: second, .. } = package::build(&cx.paths.repo, 2)?;
    let tree = Tree::new(cx, suite, Kind::Minimal)?;
    let before = tree.files()?;

    tree.install(&first)?;
    println!("{}", tree.run(&["ublkup", "doctor"])?);
    tree.run(&["truncate", "-s", "64M", "/srv/disk.img"])?;
    let server = tree.serve(&["disk=/srv/disk.img"])?;
    let socket = tree.path("run/ublkup/exports/disk/vhost-user-blk");
    let connect = || {
        let stream = UnixStream::connect(&socket);
        stream.with_context(|| format!("cannot connect to {}", socket.display()))
    };
    let mut client = Driver::running(connect()?, USUAL);
    ensure!(client.write(8, &[7; 4096]) == OK, "a write failed");

    let refused = tree.finish(&["apt-get", "remove", "-y", "ublkup"])?;
    ensure!(!refused.status.success(), "removed under a served disk");
    let told = refused.stdout + &refused.stderr;
    ensure!(told.contains("ublkup stop NAME"), "{told}");
    ensure!(
        client.read(8, 4096) == (OK, vec![7; 4096]),
        "a refusal was felt"
    );

    tree.install(&second)?;
    let version = tree.run(&["dpkg-query", "-W", "-f", "${Version}", "ublkup"])?;
    ensure!(version.ends_with("-2"), "it is {version}");
    ensure!(
        client.read(8, 4096) == (OK, vec![7; 4096]),
        "the upgrade was felt"
    );
    let next = tree.serve(&["--take-over", "disk=/srv/disk.img"])?;
    ensure!(
        server.exit_code()? == Some(0),
        "the old version did not end in order"
    );
    drop(client);
    let stat = tree.run(&["ublkup", "stat", "disk"])?;
    println!("{stat}");
    tree.run(&["ublkup", "stop", "--force", "disk"])?;
    ensure!(
        next.exit_code()? == Some(0),
        "the new version did not end in order"
    );
    let data = fs::read(tree.path("srv/disk.img"))?;
    ensure!(
        data[4096..8192] == [7; 4096],
        "the write is not in the image"
    );

    tree.run(&["apt-get", "purge", "-y", "ublkup"])?;
    fs::remove_file(tree.path("srv/disk.img"))?;
    let after = tree.files()?;
    let left: Vec<_> = after.symmetric_difference(&before).collect();
    ensure!(left.is_empty(), "left or missing: {left:?}");
    Ok(())
}

fn the_package_of_red_hats_kin_has_what_debians_has(cx: &Context) -> Result<()> {
    let Packages { deb, rpm } = package::build(&cx.paths.repo, 1)?;
    let list = |text: String, libraries: &str, zsh: &str| -> BTreeSet<String> {
        text.lines()
            .map(|line| line.replace(libraries, "LIB").replace(zsh, "ZSH"))
            .filter(|path| !path.ends_with('/') && !path.contains("copyright"))
            .collect()
    };
    let of_deb = format!(
        "dpkg-deb --fsys-tarfile '{}' | tar -t | sed 's/^\\.//'",
        deb.display()
    );
    let of_deb = sh(&of_deb).run()?;
    let of_rpm = Shell::new("rpm").args(["-qlp"]).arg(&rpm).run()?;
    let triplet = Shell::new("dpkg-architecture")
        .args(["-q", "DEB_HOST_MULTIARCH"])
        .run()?;
    let of_deb = list(
        of_deb,
        &format!("lib/{}", triplet.trim()),
        "vendor-completions",
    );
    let of_rpm = list(of_rpm, "lib64", "site-functions");
    let missing: Vec<_> = of_deb.difference(&of_rpm).collect();
    ensure!(missing.is_empty(), "the .rpm has no {missing:?}");
    Ok(())
}
