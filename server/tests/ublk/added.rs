//! Exports with block devices that are added to a confined server.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde_json::Value;
use testkit::proc::Holdings;
use upgrade_proto::{Answer, BlockUpgrade, Lookup, Route};

use super::common::{Sandbox, eventually, sandbox};
use super::upgrade::{direct, read_block, service, write_block};
use super::write_page;

fn stat(lab: &Sandbox, export: &str) -> Value {
    serde_json::from_str(&lab.ok(&["stat", export, "--json"])).unwrap()
}

fn device(lab: &Sandbox, export: &str) -> PathBuf {
    let device = &stat(lab, export)["ublk"]["device"];
    device.as_str().expect("a block device").into()
}

fn add(lab: &Sandbox, spec: &str) -> PathBuf {
    lab.ok(&["add", "--ublk", "yes", spec]);
    device(lab, spec.split('=').next().unwrap())
}

/// What is below a folder, if it is there.
fn tree(folder: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
        }
        found.insert(path);
    }
    found
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn block_devices_come_and_go_while_a_confined_server_runs() {
    let lab = sandbox();
    let [a, b] = ["a.img", "b.img"].map(|name| lab.image(name, 1 << 20).display().to_string());
    let server = lab.serve(&["--ublk", "yes", &format!("a=file:{a}")]);
    assert_eq!(stat(&lab, "a")["sandbox"]["on"], true);
    let used = device(&lab, "a");
    let held = direct(&used);
    let spec = |round: usize| match round % 2 {
        0 => format!("b=file:{b}"),
        _ => "b=mem:1M".to_owned(),
    };
    let left = || (tree(&lab.path("run")), tree(Path::new("/dev/ublkup")));
    let mut before = None;
    for round in 0..6 {
        let disk = add(&lab, &spec(round));
        assert_eq!(stat(&lab, "b")["pid"], server.pid());
        let names: BTreeSet<_> = tree(Path::new("/dev/ublkup"));
        assert!(
            names
                .iter()
                .all(|path| !path.display().to_string().contains("ublkc"))
        );
        write_page(&disk).unwrap();
        write_block(&held, 1, b'a').unwrap();
        let file = direct(&disk);
        write_block(&file, 2, b'b').unwrap();
        assert!(read_block(&file, 2).0.iter().all(|&byte| byte == b'b'));
        drop(file);
        if round % 2 == 0 {
            lab.ok(&["resize", "b", "2M"]);
            lab.ok(&["resize", "b", "1M", "--shrink"]);
        }
        lab.ok(&["remove", "b"]);
        assert!(!disk.exists(), "{round}: {}", disk.display());
        if round == 1 {
            before = Some((Holdings::of(server.pid()).unwrap(), left()));
        }
    }
    let (held_before, left_before) = before.unwrap();
    eventually("nothing more than before", || {
        let now = Holdings::of(server.pid()).unwrap();
        let (run, devices) = left();
        now.threads <= held_before.threads
            && now.descriptors <= held_before.descriptors
            && run.is_subset(&left_before.0)
            && devices.is_subset(&left_before.1)
    });
    drop(held);
    server.stop().unwrap();
    lab.is_clean();
    assert!(!used.exists());
    assert_eq!(tree(Path::new("/dev/ublkup/servers")), BTreeSet::new());
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn clients_come_by_the_descriptor_of_an_added_block_device() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "yes", "a=mem:1M"]);
    let entries = || tree(&lab.path("run/fd-upgrade")).len();
    let before = entries();
    let disk = add(&lab, "b=mem:1M");
    assert_eq!(
        stat(&lab, "b")["vhost"]["upgrade"],
        serde_json::json!(["kernel", "registry"])
    );
    for (kernel, route) in [(true, Route::Kernel), (false, Route::Registry)] {
        let lookup = Lookup {
            kernel,
            runtime_dirs: vec![lab.path("run")],
            ..Lookup::default()
        };
        let claim = BlockUpgrade::open(&disk, &service(), &lookup).unwrap();
        let Answer::Found(upgraded) = claim else {
            panic!("{route:?}: {claim:?}");
        };
        assert_eq!(upgraded.connection().route(), route);
        assert_eq!(upgraded.connection().peer().pid, server.pid().cast_signed());
        eventually("the client has the disk", || {
            stat(&lab, "b")["vhost"]["sessions"][0]["pid"] == std::process::id()
        });
        upgraded.release().unwrap();
        eventually("the client has gone", || {
            stat(&lab, "b")["access"] == "block"
        });
    }
    lab.ok(&["remove", "b"]);
    assert_eq!(entries(), before);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_added_block_device_waits_for_the_next_server_of_the_name() {
    let lab = sandbox();
    let [a, b, c] =
        ["a.img", "b.img", "c.img"].map(|name| lab.image(name, 1 << 20).display().to_string());
    let args = [
        "--ublk",
        "yes",
        "--server-name",
        "s",
        &format!("a=file:{a}"),
    ];
    let server = lab.serve(&args);
    let disk = add(&lab, &format!("b=file:{b}"));
    let held = direct(&disk);
    write_block(&held, 3, b'3').unwrap();
    server.kill().unwrap();
    let server = lab.serve(&args);
    assert_eq!(device(&lab, "b"), disk);
    write_block(&held, 4, b'4').unwrap();
    for (number, byte) in [(3, b'3'), (4, b'4')] {
        assert!(
            read_block(&held, number)
                .0
                .iter()
                .all(|&found| found == byte)
        );
    }
    // One whose server is dead is gone on with by a server that runs.
    drop(held);
    lab.ok(&["stop", "b"]);
    let other = lab.serve(&[
        "--ublk",
        "yes",
        "--server-name",
        "t",
        &format!("c=file:{c}"),
    ]);
    let disk = device(&lab, "c");
    let held = direct(&disk);
    write_block(&held, 5, b'5').unwrap();
    other.kill().unwrap();
    assert_eq!(add(&lab, &format!("c=file:{c}")), disk);
    assert!(read_block(&held, 5).0.iter().all(|&found| found == b'5'));
    drop(held);
    server.stop().unwrap();
    lab.is_clean();
}

/// What is noted of a device that is gone does not make the new one unknown.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_added_block_device_is_recovered_also_where_an_earlier_one_was_removed_or_is_dead() {
    let lab = sandbox();
    let image = lab.image("b.img", 1 << 20).display().to_string();
    for (earlier, removed) in [
        (format!("b=file:{image}"), true),
        ("b=mem:1M".into(), false),
    ] {
        let first = lab.serve(&["--ublk", "yes", &earlier]);
        let disk = device(&lab, "b");
        first.kill().unwrap();
        if removed {
            lab.ok(&["doctor", "--remove", disk.to_str().unwrap(), "--yes"]);
        }
        let server = lab.serve(&["--ublk", "yes", "--server-name", "s", "a=mem:1M"]);
        let disk = add(&lab, &format!("b=file:{image}"));
        let held = direct(&disk);
        write_block(&held, 1, b'1').unwrap();
        server.kill().unwrap();
        let server = lab.recover(&["b"]);
        assert_eq!(device(&lab, "b"), disk);
        assert!(read_block(&held, 1).0.iter().all(|&found| found == b'1'));
        drop(held);
        server.stop().unwrap();
        lab.ok(&["doctor", "--clean"]);
        lab.is_clean();
    }
}

/// The record says which file was served, with or without the note.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_waiting_block_device_gets_no_other_file_by_being_added() {
    let lab = sandbox();
    let image = lab.image("b.img", 1 << 20);
    let spec = format!("b=file:{}", image.display());
    let first = lab.serve(&["--ublk", "yes", &spec]);
    let disk = device(&lab, "b");
    first.kill().unwrap();
    let kept = image.with_extension("kept");
    std::fs::rename(&image, &kept).unwrap();
    drop(lab.image("b.img", 1 << 20));
    let server = lab.serve(&["--ublk", "yes", "a=mem:1M"]);
    let words = ["b is not added", "not the one that was served"];
    lab.fails(&["add", "--ublk", "yes", &spec], 1, &words);
    assert!(disk.exists());
    std::fs::rename(kept, &image).unwrap();
    assert_eq!(add(&lab, &spec), disk);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_that_has_given_up_making_block_devices_says_so() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "a=mem:1M"]);
    let words = ["this server has given up making block devices"];
    lab.fails(&["add", "--ublk", "yes", "b=mem:1M"], 1, &words);
    lab.ok(&["add", "b=mem:1M"]);
    assert_eq!(stat(&lab, "b")["ublk"], Value::Null);
    server.stop().unwrap();
    lab.is_clean();
    let server = lab.serve(&["--ublk", "no", "--sandbox=no", "a=mem:1M"]);
    let disk = add(&lab, "b=mem:1M");
    write_page(&disk).unwrap();
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_that_is_not_what_it_was_gets_no_device_of_another_one() {
    let lab = sandbox();
    // One device that has a server, one that waits.
    let image = lab.image("w.img", 1 << 20).display().to_string();
    let dead = lab.serve(&["--ublk", "yes", &format!("w=file:{image}")]);
    let number = |export: &str| -> u32 {
        let device = device(&lab, export);
        device.to_str().unwrap()["/dev/ublkb".len()..]
            .parse()
            .unwrap()
    };
    let waiting = number("w");
    dead.kill().unwrap();
    let server = lab.serve(&["--ublk", "yes", "--server-name", "s", "a=mem:1M"]);
    let served = number("a");
    let folder = lab.path("run/servers/fake");
    std::fs::create_dir(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let listener = UnixListener::bind(folder.join("control")).unwrap();
    let devices = PathBuf::from(format!("/dev/ublkup/servers/{}", std::process::id()));
    std::fs::create_dir_all(&devices).unwrap();
    // What is asked after this was said.
    let say = |lines: &mut BufReader<UnixStream>, line: &str| {
        writeln!(lines.get_mut(), "{line}").unwrap();
        let mut asked = String::new();
        lines.read_line(&mut asked).unwrap();
        asked
    };
    let accept = || {
        let (stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream);
        lines.read_line(&mut String::new()).unwrap();
        lines
    };
    let status = serde_json::json!({
        "schema": 1, "version": "1", "server": "fake", "pid": 1, "started_unix_seconds": 1,
        "sandbox": {"on": false, "missing": []}, "makes_block_devices": true, "lost_log_lines": 0,
        "exports": [],
    });
    for (what, number) in [
        ("ublk-device", served),
        ("ublk-device", waiting),
        ("upgrade-entry", served),
    ] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                say(&mut accept(), &status.to_string());
                let mut lines = accept();
                let wants = serde_json::json!({"wants": {what: number}});
                let refusal = say(&mut lines, &wants.to_string());
                say(&mut lines, refusal.trim_end());
            });
            let words = ["b is not added", "which is not what it was to make"];
            lab.fails(&["add", "--server", "fake", "b=mem:1M"], 1, &words);
        });
    }
    assert_eq!(tree(&devices), BTreeSet::new());
    std::fs::remove_dir(devices).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    server.stop().unwrap();
    lab.ok(&["stop", "--force", "w"]);
    lab.is_clean();
}
