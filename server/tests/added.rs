//! Exports that are added to a server while it runs.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/exports.rs"]
mod exports;

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Driver, OK, Sandbox, eventually, sandbox};
use exports::{WRITE_THROUGH, ask, exercise, stat, tree};
use rustix::process::Signal;
use serde_json::{Value, json};
use testkit::proc::Holdings;
use upgrade_proto::Peer;

fn is_confined(lab: &Sandbox, export: &str) -> bool {
    stat(lab, export)["sandbox"]["on"] == true
}

#[test]
fn an_export_is_added_to_a_confined_server_and_to_one_that_is_not() {
    for sandbox_option in ["--sandbox=yes", "--sandbox=no"] {
        let lab = sandbox();
        let server = lab.serve(&["--ublk", "no", sandbox_option, "a=mem:1M"]);
        assert_eq!(is_confined(&lab, "a"), sandbox_option == "--sandbox=yes");
        let image = lab.image("b.img", 1 << 20).display().to_string();
        let said = lab.ok(&["add", "--ublk", "no", &format!("b={image}"), "c=mem:1M"]);
        let socket = |export| lab.path(&format!("run/exports/{export}/vhost-user-blk"));
        let expected = format!(
            "b vhost-user-blk {}\nc vhost-user-blk {}\n",
            socket("b").display(),
            socket("c").display()
        );
        assert_eq!(said, expected);
        for export in ["a", "b", "c"] {
            exercise(&lab, export);
        }
        assert_eq!(stat(&lab, "b")["pid"], server.pid());
        for socket in ["control", "vhost-user-blk"] {
            let socket = lab.path(&format!("run/exports/b/{socket}"));
            let peer = Peer::of(UnixStream::connect(socket).unwrap()).unwrap();
            assert_eq!(
                peer.pid,
                server.pid().cast_signed(),
                "not the command that made it"
            );
        }
        lab.ok(&["add", "d=mem:1M"]);
        // What was not made is not recorded.
        let is_recorded = lab.path("run/devices/d").exists();
        assert_eq!(is_recorded, !stat(&lab, "d")["ublk"].is_null());
        lab.ok(&["set", "b", "iops-total=100"]);
        lab.ok(&["resize", "b", "2M"]);
        lab.ok(&["stop", "--force", "b"]);
        assert!(!lab.path("run/exports/b").exists());
        lab.ok(&["add", "--ublk", "no", &format!("b={image}")]);
        assert_eq!(stat(&lab, "b")["size_bytes"], 2 << 20);
        server.stop().unwrap();
        lab.is_clean();
        let servers = std::fs::read_dir(lab.path("run/servers")).unwrap();
        assert_eq!(servers.count(), 0);
    }
}

/// Sets what it holds, however it ends.
struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Has a client write and read until it is told to stop. Returns how often it did, and the longest pause.
fn load(lab: &Sandbox, export: &str, ends: &AtomicBool) -> (u64, Duration) {
    let mut driver = Driver::running(lab.connect(export), WRITE_THROUGH);
    let (mut rounds, mut longest) = (0, Duration::ZERO);
    while !ends.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let sector = rounds % 1024;
        let byte = u8::try_from(rounds % 251).unwrap();
        assert_eq!(driver.write(sector, &[byte; 512]), OK, "{export}");
        assert_eq!(driver.read(sector, 512), (OK, vec![byte; 512]), "{export}");
        longest = longest.max(begun.elapsed());
        rounds += 1;
    }
    (rounds, longest)
}

#[test]
fn two_hundred_exports_come_and_go_beside_two_that_are_used_and_nothing_is_left() {
    const ROUNDS: usize = 200;
    const ROOM: &str = "4";
    let lab = sandbox();
    let images = ["a.img", "b.img", "c.img"].map(|name| lab.image(name, 1 << 20));
    let [a, b, c] = images.map(|image| image.display().to_string());
    let (a, b) = (format!("a=file:{a}"), format!("b=file:{b}"));
    let server = lab.serve(&["--ublk", "no", "--room", ROOM, &a, &b]);
    assert!(is_confined(&lab, "a"));
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let loads = ["a", "b"].map(|export| {
            let (lab, ends) = (&lab, &ends);
            scope.spawn(move || load(lab, export, ends))
        });
        // Also if this fails: the clients are waited for.
        let end = EndOnDrop(&ends);
        let add_and_remove = |round: usize| {
            let spec = match round % 2 {
                0 => format!("c{round}=file:{c}"),
                _ => format!("c{round}=mem:1M"),
            };
            lab.ok(&["add", "--ublk", "no", &spec]);
            let name = format!("c{round}");
            exercise(&lab, &name);
            lab.ok(&["remove", "--force", &name]);
        };
        // What is made once, and the clients.
        (0..4).for_each(add_and_remove);
        eventually("the clients run", || {
            ["a", "b"].iter().all(|export| {
                let writes = &stat(&lab, export)["vhost"]["counters"]["writes"];
                writes.as_u64() > Some(0)
            })
        });
        let before = (Holdings::of(server.pid()).unwrap(), tree(&lab.path("run")));
        (4..ROUNDS).for_each(add_and_remove);
        // Threads of the last client end after its answer.
        let after = || (Holdings::of(server.pid()).unwrap(), tree(&lab.path("run")));
        eventually("nothing more than before", || {
            let after = after();
            (after.0.threads, after.0.descriptors) == (before.0.threads, before.0.descriptors)
                && after.1 == before.1
        });
        let more_kib = after().0.resident_kib.saturating_sub(before.0.resident_kib);
        drop(end);
        let loads = loads.map(|load| load.join().unwrap());
        println!(
            "{ROUNDS} exports came and went: {more_kib} KiB more; rounds and longest pause: {loads:?}"
        );
        assert!(more_kib < 16 << 10, "{more_kib} KiB more");
        assert!(loads.iter().all(|(rounds, _)| *rounds > 0));
    });
    for export in ["a", "b"] {
        assert_eq!(stat(&lab, export)["last_error"], Value::Null);
    }
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_cannot_be_added_is_told_and_leaves_nothing() {
    let lab = sandbox();
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let spec = format!("a=file:{image}");
    lab.fails(&["add", "b=mem:1M"], 1, &["no server runs under"]);
    let server = lab.serve(&["--ublk", "no", "--room", "1", "--server-name", "s", &spec]);
    let before = tree(&lab.path("run"));
    let missing = lab.path("missing").display().to_string();
    for (spec, words) in [
        ("a=mem:1M", "an export called 'a' is already served"),
        (&format!("b=file:{image}"), "is in use by another process"),
        (&format!("b=file:{missing}"), "No such file"),
        ("b=mem:1M,ublk=yes", "given up making block devices"),
        (
            "b=mem:1M,ublk=no,vhost-socket=/nowhere/s",
            "a folder that does not exist",
        ),
    ] {
        lab.fails(&["add", spec], 1, &["is not added", words]);
        assert_eq!(tree(&lab.path("run")), before, "{spec}");
    }
    lab.fails(
        &["add", "--server", "t", "b=mem:1M"],
        1,
        &["no server called 't' runs; there are: s"],
    );
    let usage = lab.finish(&["add", "--name", "x", "b=mem:1M", "c=mem:1M"], &[]);
    assert_eq!(usage.status.code(), Some(2));
    // There is room for one, and again when that has ended.
    for _ in 0..2 {
        lab.ok(&["add", "--ublk", "no", "b=mem:1M"]);
        lab.fails(
            &["add", "--ublk", "no", "c=mem:1M"],
            1,
            &["no room for another export"],
        );
        lab.ok(&["stop", "b"]);
    }
    let other = lab.serve(&[
        "--ublk",
        "no",
        "--room",
        "0",
        "--server-name",
        "t",
        "d=mem:1M",
    ]);
    lab.fails(
        &["add", "b=mem:1M"],
        1,
        &["several servers run: choose one of them: s, t"],
    );
    lab.fails(
        &["add", "--server", "t", "b=mem:1M"],
        1,
        &["takes no exports while it runs"],
    );
    other.stop().unwrap();
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_server_of_the_same_name_goes_on_with_what_was_added() {
    let lab = sandbox();
    let images = ["a.img", "b.img", "c.img"].map(|name| lab.image(name, 1 << 20));
    let [a, b, c] = images.map(|image| image.display().to_string());
    let (a, b, c) = (
        format!("a=file:{a}"),
        format!("b=file:{b}"),
        format!("c=file:{c}"),
    );
    let args = ["--ublk", "no", "--server-name", "s", &a];
    let server = lab.serve(&args);
    lab.ok(&["add", "--ublk", "no", &b, &c, "m=mem:1M"]);
    lab.ok(&["set", "b", "iops-total=1000"]);
    // A client has the disk.
    let driver = Driver::running(lab.connect("b"), WRITE_THROUGH);
    server.kill().unwrap();
    std::fs::remove_file(lab.path("c.img")).unwrap();
    let server = lab.serve(&args);
    assert_eq!(stat(&lab, "b")["limits"]["iops_total"], 1000);
    assert_eq!(stat(&lab, "b")["pid"], server.pid());
    assert_eq!(
        stat(&lab, "b")["access"],
        "waiting",
        "its client may come back"
    );
    drop(driver);
    let list = lab.finish(&["list"], &[]);
    assert!(list.stderr.contains("c: its server has died"), "{list:?}");
    assert!(
        !list.stderr.contains("m:"),
        "what was in memory is gone: {list:?}"
    );
    // One that hands over.
    let (status, _) = server.end_by(Signal::USR2).unwrap();
    assert!(status.success());
    let server = lab.serve(&args);
    assert_eq!(stat(&lab, "b")["limits"]["iops_total"], 1000);
    server.kill().unwrap();
    // Alone.
    let recovered = lab.recover(&["b"]);
    let server = lab.serve(&args);
    assert_eq!(stat(&lab, "b")["pid"], recovered.pid(), "it has a server");
    recovered.stop().unwrap();
    server.stop().unwrap();
    lab.ok(&["stop", "--force", "c"]);
    lab.is_clean();
}

#[test]
fn what_a_dead_server_left_is_there_after_an_export_could_not_be_added() {
    what_a_dead_server_left_stays(&[]);
    // Without a spare folder.
    what_a_dead_server_left_stays(&["--sandbox=no", "--room", "0"]);
}

fn what_a_dead_server_left_stays(options: &[&str]) {
    let lab = sandbox();
    let image = lab.image("a.img", 1 << 20);
    let spec = format!("a=file:{}", image.display());
    let server = lab.serve(&["--ublk", "no", &spec]);
    // It dies while a client has the disk.
    let driver = Driver::running(lab.connect("a"), WRITE_THROUGH);
    server.kill().unwrap();
    drop(driver);
    let server = lab.serve(&[&["--ublk", "no", "b=mem:1M"], options].concat());
    let served = std::fs::read_to_string(lab.path("run/exports/a/served")).unwrap();
    let moved = lab.path("moved.img");
    std::fs::rename(&image, &moved).unwrap();
    let nowhere = format!("{spec},vhost-socket=/nowhere/s");
    let large = format!("{spec},block-size=4096");
    for (spec, is_there) in [(&spec, false), (&nowhere, true), (&large, true)] {
        if is_there && moved.exists() {
            std::fs::rename(&moved, &image).unwrap();
            image_of(&image, 512);
        }
        lab.fails(&["add", "--ublk", "no", spec], 1, &["a is not added"]);
        assert!(lab.path("run/exports/a/upgraded").exists(), "{spec}");
        let now = std::fs::read_to_string(lab.path("run/exports/a/served")).unwrap();
        assert_eq!(now, served, "{spec}");
    }
    image_of(&image, 1 << 20);
    lab.ok(&["add", "--ublk", "no", &spec]);
    assert_eq!(stat(&lab, "a")["access"], "waiting");
    lab.ok(&["stop", "--force", "a"]);
    server.stop().unwrap();
    lab.is_clean();
}

fn image_of(path: &Path, len_bytes: u64) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.set_len(len_bytes).unwrap();
}

#[test]
fn what_does_not_fit_an_export_is_refused() {
    let lab = sandbox();
    let server = lab.serve(&["--ublk", "no", "--server-name", "s", "a=mem:1M"]);
    let before = tree(&lab.path("run"));
    for (descriptors, why) in [
        (json!([]), "the lock of its name was not handed over"),
        (json!(["lock"]), "1 descriptors were announced, and 0 came"),
        (json!(["tape"]), "not a command"),
    ] {
        let request = json!({
            "command": "add",
            "served": {"folder": "/", "spec": "b=mem:1M", "options": {"name": "b"}},
            "descriptors": descriptors,
        });
        let answer = ask(&lab.path("run/servers/s/control"), &request);
        assert!(answer.contains(why), "{answer}");
    }
    assert_eq!(tree(&lab.path("run")), before);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_a_guest_writes_into_the_notes_of_its_server_is_not_served() {
    let lab = sandbox();
    let images = ["a.img", "b.img", "secret.img"].map(|name| lab.image(name, 1 << 20));
    let [a, b, secret] = images.map(|image| image.display().to_string());
    let args = ["--ublk", "no", "--server-name", "s", &format!("a=file:{a}")];
    let server = lab.serve(&args);
    lab.ok(&["add", "--ublk", "no", &format!("b=file:{b}")]);
    let note = lab.path("run/exports/b/served");
    let noted = std::fs::read_to_string(&note).unwrap();
    server.kill().unwrap();
    std::fs::write(&note, noted.replace("b.img", "secret.img")).unwrap();
    let server = lab.serve(&args);
    assert_eq!(stat(&lab, "b")["backend"], format!("file:{b}"));
    server.kill().unwrap();
    // Neither is it by a person who does not know of it.
    for (name, image) in [("a", &a), ("b", &b)] {
        let note = lab.path(&format!("run/exports/{name}/served"));
        let noted = std::fs::read_to_string(&note).unwrap();
        std::fs::write(&note, noted.replace(image, &secret)).unwrap();
        let server = lab.recover(&[name]);
        assert_eq!(stat(&lab, name)["backend"], format!("file:{image}"));
        server.kill().unwrap();
    }
    let server = lab.serve(&args);
    // One that was served in another way since.
    lab.ok(&["stop", "b"]);
    let other = lab.serve(&["--ublk", "no", &format!("b=file:{secret}")]);
    other.kill().unwrap();
    server.kill().unwrap();
    let server = lab.serve(&args);
    assert!(lab.finish(&["stat", "b"], &[]).stderr.contains("died"));
    lab.ok(&["stop", "--force", "b"]);
    lab.ok(&["add", "--ublk", "no", &format!("b=file:{b}")]);
    server.kill().unwrap();
    // An export without a record.
    let record = lab.path("run/records/exports-b");
    assert!(std::fs::read_to_string(&record).unwrap().contains(&b));
    std::fs::remove_file(&record).unwrap();
    lab.fails(
        &["recover", "b"],
        1,
        &["there is no record of how 'b' was served"],
    );
    let server = lab.serve(&args);
    assert!(lab.finish(&["stat", "b"], &[]).stderr.contains("died"));
    server.stop().unwrap();
    lab.ok(&["stop", "--force", "b"]);
    lab.is_clean();
}

#[test]
fn users_of_the_servers_socket_add_nothing_and_reach_only_exports_with_the_same_users() {
    if !rustix::process::geteuid().is_root() {
        println!("only root can be another user");
        return;
    }
    let lab = sandbox();
    let server = lab.serve(&[
        "--ublk",
        "no",
        "--server-name",
        "s",
        "a=mem:1M,admin-socket-mode=0666",
    ]);
    std::fs::set_permissions(lab.path("."), Permissions::from_mode(0o755)).unwrap();
    let before = tree(&lab.path("run"));
    let socket = lab.path("run/servers/s/control");
    let as_nobody = |request: Value| {
        let socket = socket.clone();
        let ask = move || {
            // SAFETY: the call has no pointers. It is for this thread alone, unlike that of the C library.
            let result = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
            assert_eq!(result, 0);
            let mut stream = UnixStream::connect(&socket).unwrap();
            writeln!(stream, "{request}").unwrap();
            BufReader::new(stream)
        };
        std::thread::spawn(ask).join().unwrap()
    };
    let line = |answer: &mut BufReader<UnixStream>| {
        let mut line = String::new();
        answer.read_line(&mut line).unwrap();
        line
    };
    let ask_as_nobody = |request| line(&mut as_nobody(request));
    let answer = ask_as_nobody(json!({
        "command": "add",
        "served": {"folder": "/", "spec": "b=mem:1M", "options": {"name": "b"}},
        "descriptors": [],
    }));
    assert!(
        answer.contains("exports are added by the user of the server, or root"),
        "{answer}"
    );
    assert_eq!(tree(&lab.path("run")), before);
    // Users of the socket have no rights over exports that have others, and learn nothing of them.
    let mut events = as_nobody(json!({"command": "events"}));
    assert!(line(&mut events).contains("begin"));
    lab.ok(&["add", "--ublk", "no", "b=mem:1M"]);
    lab.ok(&["set", "a", "iops-total=7"]);
    let told = line(&mut events);
    assert!(told.contains("changed"), "{told}");
    let stop = |export| json!({"command": "stop", "export": export, "force": true});
    let answer = ask_as_nobody(stop("b"));
    assert!(answer.contains("other users than this socket"), "{answer}");
    let server_says: Value =
        serde_json::from_str(&ask_as_nobody(json!({"command": "server"}))).unwrap();
    assert_eq!(server_says["exports"], json!(["a"]));
    let answer: Value = serde_json::from_str(&ask_as_nobody(json!({"command": "stat"}))).unwrap();
    let exports = answer["exports"].as_array().unwrap();
    assert_eq!(exports.len(), 1);
    assert_eq!(exports[0]["name"], "a");
    assert_eq!(stat(&lab, "b")["state"], "serving");
    lab.ok(&["stop", "b"]);
    let answer = ask_as_nobody(stop("a"));
    assert!(answer.contains("stopped"), "{answer}");
    let (status, _) = server.wait().unwrap();
    assert!(status.success());
    lab.is_clean();
}
