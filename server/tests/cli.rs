//! The command line as a user meets it: what goes wrong gets one clear line and the right exit
//! code, and leaves nothing behind; what goes right can be listed, looked at and stopped.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::time::Duration;

use common::sandbox;
use common::{Driver, OK, T_OUT, USUAL, eventually};
use rustix::process::Signal;
use serde_json::Value;
use testkit::proc::{Holdings, catches_hangups, sleeps};
use testkit::sandbox::Sandbox;
use testkit::seccomp::filter;

/// What a command prints with `--json`.
fn json(lab: &Sandbox, args: &[&str]) -> Value {
    serde_json::from_str(&lab.ok(&[args, &["--json"]].concat())).unwrap()
}

/// A SPEC of an image with 1 MiB, to be served as `name`.
fn image(lab: &Sandbox, name: &str) -> String {
    let path = lab.image(&format!("{name}.img"), 1 << 20);
    format!("{name}=file:{}", path.display())
}

#[test]
fn malformed_specs_are_wrong_usage() {
    let lab = sandbox();
    for (spec, why) in [
        ("disk.img", "there is no file called disk.img"),
        ("../x=mem:1M", "not a name"),
        ("mem:1M,readonly", "did you mean 'read-only'?"),
        ("mem:1M,ublk=on", "give one of auto, yes, no"),
    ] {
        lab.serve_fails(&[spec], 2, &[why, spec]);
    }
    lab.serve_fails(&["a=mem:1M", "a=mem:1M"], 2, &["two exports"]);
    lab.serve_fails(&["a=mem:1M,cpus=1023"], 2, &["'a': cpus: processor 1023"]);
    lab.serve_fails(&["mem:1M,ublk=no,vhost=no"], 2, &["both 'no'"]);
    for (option, value, why) in [
        ("--queues", "0", "give a number from 1 to 64"),
        ("--poll-us", "1.5", "give a number of microseconds"),
        ("--cpus", "3-1", "give processors below 1024"),
        ("--log", "warning", "give one of error, warn, info"),
    ] {
        let finished = lab.finish(&["serve", option, value, "mem:1M"], &[]);
        let told = finished.stderr;
        assert_eq!(finished.status.code(), Some(2), "{told}");
        assert!(told.contains(why), "{told}");
    }
    lab.serve_fails(&["--config", "/does/not/exist"], 2, &["/does/not/exist"]);
    lab.is_clean();
}

#[test]
fn an_error_in_a_configuration_file_names_line_key_and_what_is_allowed() {
    let lab = sandbox();
    let path = lab.path("file.toml");
    let file = path.display().to_string();
    for (text, words) in [
        (
            "[defaults]\nqueues = 2\n\n[[export]]\nspec = 'a=mem:1M'\npoll-us = 'x'\n",
            [":6: export 'a': poll-us: invalid value 'x'", "'always'"],
        ),
        ("[[export]]\nspec = \n", [":2: ", "file.toml"]),
    ] {
        std::fs::write(&path, text).unwrap();
        lab.serve_fails(&["--config", &file], 2, &words);
    }
    lab.is_clean();
}

#[test]
fn paths_in_a_configuration_file_are_relative_to_it_also_when_the_export_is_recovered() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20);
    let path = lab.path("file.toml");
    let text = "[[export]]\nspec = 'a=file:disk.img'\nublk = 'no'\nvhost-socket = 'a.sock'\n";
    std::fs::write(&path, text).unwrap();
    let is_served = || {
        let stat = json(&lab, &["stat", "a"]);
        assert_eq!(stat["backend"], format!("file:{}", image.display()));
        UnixStream::connect(lab.path("a.sock")).unwrap();
    };
    let server = lab.serve(&["--config", &path.display().to_string()]);
    is_served();
    server.kill().unwrap();
    std::fs::remove_file(path).unwrap();
    let server = lab.recover(&["a"]);
    is_served();
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn files_that_cannot_be_served_are_told_by_path() {
    let lab = sandbox();
    let spec = |name: &str| format!("file:{}", lab.path(name).display());
    let missing = spec("missing.img");
    lab.serve_fails(&[&missing], 1, &["missing.img", "No such file"]);
    let told = lab.finish(&["serve", &missing], &[]).stderr;
    assert_eq!(told.matches("os error 2").count(), 1, "{told}");
    std::fs::write(lab.path("small.img"), [0; 100]).unwrap();
    lab.serve_fails(&[&spec("small.img")], 1, &["small.img", "100"]);
    std::fs::create_dir(lab.path("folder")).unwrap();
    lab.serve_fails(&[&spec("folder")], 1, &["folder"]);
    lab.is_clean();
}

#[test]
fn a_file_that_may_not_be_written_is_refused_and_read_only_is_suggested() {
    let lab = sandbox();
    let image = lab.image("ro.img", 1 << 20);
    std::fs::set_permissions(&image, std::fs::Permissions::from_mode(0o444)).unwrap();
    if rustix::process::geteuid().is_root() {
        // Root may write everything; the kernel refuses a directory of /proc even so.
        lab.serve_fails(&["v=file:/proc/version"], 1, &["/proc/version"]);
    } else {
        lab.serve_fails(
            &[&format!("file:{}", image.display())],
            1,
            &["ro.img", "read-only"],
        );
    }
    lab.is_clean();
}

#[test]
fn one_image_is_served_by_one_writer() {
    let lab = sandbox();
    let spec = format!("file:{}", lab.image("disk.img", 1 << 20).display());
    let server = lab.serve(&[&spec]);
    for read_only in ["off", "on"] {
        let other = format!("other={spec},read-only={read_only}");
        lab.serve_fails(&[&other], 1, &["disk.img", "in use"]);
    }
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_name_is_served_once() {
    let lab = sandbox();
    let server = lab.serve(&["a=mem:1M"]);
    let words = ["'a' is already served", "ublkup stop a"];
    lab.serve_fails(&["a=null:1G"], 1, &words);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_socket_path_that_is_taken_is_refused() {
    let lab = sandbox();
    let path = lab.path("taken.sock");
    let spec = format!("mem:1M,vhost-socket={}", path.display());
    let listener = UnixListener::bind(&path).unwrap();
    lab.serve_fails(&[&spec], 1, &["taken.sock", "in use"]);
    assert!(path.exists(), "another program's socket was removed");
    // A dead server left it, and it is replaced.
    drop(listener);
    lab.serve(&[&spec]).stop().unwrap();
    assert!(!path.exists(), "our own socket was left");
    std::fs::write(&path, "precious").unwrap();
    lab.serve_fails(&[&spec], 1, &["taken.sock"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let long = lab.path(&"x".repeat(120)).display().to_string();
    lab.serve_fails(&["--vhost-socket", &long, "mem:1M"], 1, &["shorter"]);
    lab.is_clean();
}

#[test]
fn an_export_that_cannot_start_takes_the_others_with_it_unless_told_to_keep_going() {
    let lab = sandbox();
    let args = ["--keep-going", "a=mem:1M", "b=file:/does/not/exist"];
    lab.serve_fails(&args[1..], 1, &["b", "/does/not/exist"]);
    lab.is_clean();
    let server = lab.serve(&args);
    assert!(lab.ok(&["list"]).contains("a "));
    let (status, log) = server.end_by(Signal::TERM).unwrap();
    let code = status.code();
    assert_eq!(code, Some(1), "a failed export is not forgotten: {log}");
    lab.is_clean();
}

#[test]
fn exports_are_listed_shown_and_stopped_one_by_one() {
    let lab = sandbox();
    let queues = ["--queues", "3", "--vhost-threads", "2"];
    let threads = ["--poll-us", "always", "--cpus", "0"];
    let exports = ["a=mem:1M,serial=ABC", "b=null:2G,read-only"];
    let server = lab.serve(&[&threads[..], &queues, &exports].concat());
    let list = json(&lab, &["list"]);
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    assert_eq!(
        (&list[0]["name"], &list[1]["name"]),
        (&"a".into(), &"b".into())
    );
    assert_eq!(list[0]["size_bytes"], 1 << 20);
    assert_eq!(list[0]["serial"], "ABC");
    assert_eq!(list[1]["read_only"], true);
    assert_eq!(list[0]["pid"], server.pid());
    let stat = json(&lab, &["stat", "a"]);
    assert_eq!(stat["vhost"]["counters"]["reads"], 0);
    assert_eq!(
        (&stat["poll_us"], &stat["cpus"]),
        (&"always".into(), &"0".into())
    );
    assert!(lab.ok(&["stat", "b"]).contains("read-only"));
    lab.ok(&["stop", "a"]);
    lab.fails(&["stat", "a"], 1, &["no export called 'a'"]);
    assert!(!lab.ok(&["list"]).contains("a "));
    // The other one goes on, and the name is free again.
    let again = lab.serve(&["a=mem:1M"]);
    again.stop().unwrap();
    // The last export's end is the server's.
    lab.ok(&["stop", "b"]);
    assert_eq!(server.exit_code().unwrap(), Some(0));
    lab.is_clean();
}

#[test]
fn a_disk_gets_another_size_if_it_can_have_it() {
    let lab = sandbox();
    let read_only = format!("{},read-only", image(&lab, "ro"));
    let server = lab.serve(&["a=null:1M", "m=mem:1M", &read_only, &image(&lab, "f")]);
    let path = lab.path("f.img");
    let size = || path.metadata().unwrap().len();
    assert_eq!(lab.ok(&["resize", "a", "2M"]), "a: 2M, was 1M\n");
    assert_eq!(lab.ok(&["resize", "a", "2M"]), "a: 2M as before\n");
    let resized = json(&lab, &["resize", "f", "3M"]);
    assert_eq!(
        (&resized["old_size_bytes"], &resized["size_bytes"]),
        (&(1 << 20).into(), &(3 << 20).into())
    );
    assert_eq!(size(), 3 << 20);
    // A file that its owner made larger.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    assert_eq!(lab.ok(&["resize", "f"]), "f: 4M, was 3M\n");
    lab.fails(&["resize", "f", "1M"], 1, &["f keeps its size", "--shrink"]);
    // Not even with --shrink, while a client is there that knows the size.
    let client = lab.connect("f");
    let is_there = || lab.ok(&["stat", "f"]).contains("session of");
    eventually("the client is there", is_there);
    let shrink = ["resize", "f", "1M", "--shrink"];
    lab.fails(&shrink, 1, &["f keeps its size", "client has the disk"]);
    assert_eq!(size(), 4 << 20);
    drop(client);
    eventually("the client is gone", || !is_there());
    assert_eq!(lab.ok(&shrink), "f: 1M, was 4M\n");
    assert_eq!(size(), 1 << 20);
    for (name, wanted, words) in [
        ("m", "2M", ["m keeps its size", "in memory"]),
        ("ro", "2M", ["ro keeps its size", "read-only"]),
        ("f", "1000", ["f keeps its size", "1000"]),
        ("f", "8388608T", ["f keeps its size", ""]),
        ("none", "1M", ["no export called 'none'", "ublkup list"]),
    ] {
        lab.fails(&["resize", name, wanted], 1, &words);
    }
    assert_eq!(size(), 1 << 20, "refusals change nothing");
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn a_killed_server_leaves_what_the_next_one_and_the_doctor_clear_away() {
    let lab = sandbox();
    lab.serve(&["a=mem:1M"]).kill().unwrap();
    assert!(!lab.is_empty(), "SIGKILL leaves a folder");
    lab.fails(&["recover", "a"], 1, &["what was in memory is gone"]);
    // Nobody is advised to recover it.
    let told = lab.finish(&["doctor"], &[]);
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    assert!(
        told.stdout
            .contains("a: its server has died; 'ublkup stop --force a'"),
        "{told:?}"
    );
    lab.fails(
        &["list"],
        1,
        &["a: its server has died; 'ublkup stop --force a'"],
    );
    lab.serve(&["a=mem:1M"]).stop().unwrap();
    lab.is_clean();
    lab.serve(&["a=mem:1M"]).kill().unwrap();
    assert!(
        lab.ok(&["doctor", "--clean"])
            .contains("a: its notes are removed")
    );
    lab.is_clean();
    // What no server has put there is not removed, and not in the way.
    std::fs::create_dir_all(lab.path("run/exports/a/strange")).unwrap();
    lab.serve(&["a=mem:1M"]).stop().unwrap();
    let told = lab.finish(&["doctor", "--clean"], &[]);
    assert!(
        told.stdout.contains("entries that no server made"),
        "{told:?}"
    );
    std::fs::remove_dir_all(lab.path("run/exports/a")).unwrap();
    lab.is_clean();
}

#[test]
fn the_doctor_speaks_json() {
    let lab = sandbox();
    let checks = json(&lab, &["doctor"]);
    let names = |what: &str| {
        checks
            .as_array()
            .unwrap()
            .iter()
            .any(|check| check["what"] == what)
    };
    assert!(names("io_uring") && names("ublk"), "{checks}");
}

#[test]
fn the_service_manager_is_told_when_the_server_is_ready() {
    let lab = sandbox();
    let path = lab.path("notify");
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(common::LIMIT)).unwrap();
    let server = lab.serve_with(
        &["mem:1M"],
        &[("NOTIFY_SOCKET", &path.display().to_string())],
    );
    let mut message = [0; 256];
    let len = socket.recv(&mut message).unwrap();
    let text = String::from_utf8_lossy(&message[..len]);
    assert!(text.contains("READY=1"), "{text}");
    server.stop().unwrap();
    let len = socket.recv(&mut message).unwrap();
    let text = String::from_utf8_lossy(&message[..len]);
    assert!(text.contains("STOPPING=1"), "{text}");
}

#[test]
fn a_server_started_to_outlive_its_terminal_does() {
    let lab = sandbox();
    let server = lab.serve_without_hangups(&["a=mem:1M"]);
    assert!(!catches_hangups(server.pid()).unwrap());
    server.stop().unwrap();
}

#[test]
fn completions_and_man_pages_are_made() {
    let lab = sandbox();
    assert!(lab.ok(&["completions", "bash"]).contains("complete"));
    // As the script asks.
    let offered = |words: &[&str]| {
        let index = (words.len() + 1).to_string();
        let asked = [("COMPLETE", "bash"), ("_CLAP_COMPLETE_INDEX", &index)];
        let words = [&["--", "ublkup"], words, &[""]].concat();
        lab.finish(&words, &asked).stdout
    };
    let server = lab.serve(&["a-disk=mem:1M"]);
    assert!(offered(&["stat"]).contains("a-disk"));
    server.stop().unwrap();
    assert!(!offered(&["stat"]).contains("a-disk"));
    let commands = offered(&[]);
    assert!(
        commands.contains("serve") && !commands.contains("device-"),
        "{commands}"
    );
    let folder = lab.path("man");
    lab.ok(&["man", &folder.display().to_string()]);
    let page = std::fs::read_to_string(folder.join("ublkup-serve.1")).unwrap();
    for section in ["EXAMPLES", "EXIT STATUS", "FILES", "ENVIRONMENT", "SIGNALS"] {
        assert!(page.contains(section), "{section}: {page}");
    }
    assert!(folder.join("ublkup-upgrade.7").exists());
    let page = std::fs::read_to_string(folder.join("ublkup.toml.5")).unwrap();
    assert!(page.contains("reconnect"), "{page}");
}

#[test]
fn an_idle_server_is_never_scheduled_and_small() {
    let lab = sandbox();
    let server = lab.serve(&["a=mem:1G", "b=null:1T"]);
    sleeps(server.pid()).expect("without a client");
    let resident_kib = Holdings::of(server.pid()).unwrap().resident_kib;
    // Most of it is the program, which is large where it is not optimized.
    assert!(resident_kib < 20 << 10, "{resident_kib} KiB resident");
    server.stop().unwrap();
}

#[test]
fn a_connected_admin_client_keeps_no_other_server_from_the_storage() {
    let lab = sandbox();
    let spec = image(&lab, "d");
    let args = ["--ublk", "no", &spec];
    // Says nothing, and is waited for at the end.
    let silent = || UnixStream::connect(lab.path("run/exports/d/control")).unwrap();
    let first = lab.serve(&args);
    let talker = silent();
    let second = lab.serve(&["--take-over", "--ublk", "no", &spec]);
    drop(talker);
    assert_eq!(first.exit_code().unwrap(), Some(0));
    let talker = silent();
    lab.ok(&["stop", "d"]);
    let third = lab.serve(&args);
    drop(talker);
    assert_eq!(second.exit_code().unwrap(), Some(0));
    third.stop().unwrap();
    lab.is_clean();
}

#[test]
fn stopping_an_export_that_is_being_left_to_another_server_is_refused() {
    let lab = sandbox();
    let image = lab.image("disk.img", 1 << 20);
    let spec = format!("d=fault:write=delay5000;file:{}", image.display());
    let server = lab.serve(&["--ublk", "no", &spec]);
    let socket = lab.path("run/exports/d/vhost-user-blk");
    let mut guest = Driver::running(UnixStream::connect(socket).unwrap(), USUAL);
    let stat = || json(&lab, &["stat", "d"]);
    let rounds = || stat()["vhost"]["counters"]["batches"].as_u64().unwrap();
    assert_eq!(guest.read(0, 512).0, OK);
    std::thread::sleep(Duration::from_millis(200));
    // The server ends when this has ended.
    let before = rounds();
    guest.prepare(T_OUT, 0, &[(512, 0)]);
    eventually("the write is under way", || rounds() > before);
    let (status, log) = std::thread::scope(|scope| {
        let ending = scope.spawn(|| server.end_by(rustix::process::Signal::USR2));
        eventually("the server ends", || stat()["state"] == "stopping");
        lab.fails(&["stop", "d", "--force"], 1, &["left to another server"]);
        ending.join().unwrap().unwrap()
    });
    assert_eq!(status.code(), Some(0), "{log}");
    lab.serve(&["--ublk", "no", &spec]).stop().unwrap();
    lab.is_clean();
}

#[test]
fn without_io_uring_no_server_says_that_it_is_ready() {
    let lab = sandbox();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_ublkup"));
    command
        .args(["serve", "--ublk", "no", "null:1M"])
        .env("UBLKUP_RUNTIME_DIR", lab.path("run"));
    let number = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    let refused = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EPERM).unwrap();
    let forbid = move || filter([number, number], refused, libc::SECCOMP_RET_ALLOW);
    // SAFETY: the filter is installed without allocating.
    unsafe { command.pre_exec(forbid) };
    let output = command.output().unwrap();
    let (out, errors) = (output.stdout, String::from_utf8(output.stderr).unwrap());
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(out.is_empty(), "{out:?}");
    assert!(errors.contains("io_uring cannot be used"), "{errors}");
    lab.is_clean();
}

#[test]
fn doctor_names_and_removes_what_a_killed_server_left_in_the_registry() {
    let lab = sandbox();
    let folder = lab.path("run/fd-upgrade/blk-259-7-1");
    std::fs::create_dir_all(&folder).unwrap();
    let entry = folder.join("vhost-user-blk");
    drop(UnixListener::bind(&entry).unwrap());
    std::fs::set_permissions(&entry, std::fs::Permissions::from_mode(0o600)).unwrap();
    let told = lab.ok(&["doctor"]);
    assert!(
        told.contains("blk-259-7-1/vhost-user-blk: its server was killed"),
        "{told}"
    );
    assert!(
        lab.ok(&["doctor", "--clean"])
            .contains("vhost-user-blk: removed")
    );
    assert!(!folder.exists());
    assert!(!lab.ok(&["doctor"]).contains("registry of services"));
}
