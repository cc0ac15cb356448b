//! Who may connect to the sockets of a server, and sockets that the service manager hands over.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Driver, OK, Sandbox, USUAL, sandbox};
use rustix::process::{getegid, geteuid};
use testkit::sandbox::start;
use testkit::server::Server;

/// A group that this user may give files to, which is another one than its own where that is possible.
fn group() -> u32 {
    match geteuid().is_root() {
        true => 1,
        false => getegid().as_raw(),
    }
}

/// Mode and group of a socket.
fn access(path: &Path) -> (u32, u32) {
    let found = std::fs::symlink_metadata(path).unwrap();
    (found.permissions().mode() & 0o777, found.gid())
}

#[test]
fn owner_group_and_mode_outlive_a_restart_a_take_over_and_a_crash() {
    let lab = sandbox();
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let group = group();
    let spec = format!("a=file:{image},vhost-socket-group={group}");
    let admin = format!("--admin-socket-group={group}");
    let args = [
        "--ublk",
        "no",
        "--server-name",
        "s",
        &admin,
        "--admin-socket-mode=0640",
        &spec,
    ];
    let folder = lab.path("run/exports/a");
    let expect = |when: &str| {
        assert_eq!(
            access(&folder.join("vhost-user-blk")),
            (0o660, group),
            "{when}"
        );
        assert_eq!(access(&folder.join("control")), (0o640, group), "{when}");
    };
    let first = lab.serve(&args);
    expect("at first");
    assert_eq!(access(&lab.path("run/servers/s/control")), (0o640, group));
    first.stop().unwrap();
    let restarted = lab.serve(&args);
    expect("after a restart");
    let successor = lab.serve(&[
        "--take-over",
        "--ublk",
        "no",
        &admin,
        "--admin-socket-mode=0640",
        &spec,
    ]);
    expect("after a take-over");
    drop(restarted);
    // Kills it.
    drop(successor);
    let recovered = lab.recover(&["a"]);
    expect("after a crash");
    recovered.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_cannot_be_is_refused_with_what_to_do() {
    let lab = sandbox();
    for (option, words) in [
        (
            "--vhost-socket-group=none-of-these",
            "this machine has no group called 'none-of-these'",
        ),
        (
            "--vhost-socket-owner=none-of-these",
            "this machine has no user called 'none-of-these'",
        ),
        ("--admin-socket-mode=888", "give an octal number like 0660"),
    ] {
        let finished = lab.finish(&["serve", "a=mem:1M", option], &[]);
        assert_eq!(finished.status.code(), Some(2), "{finished:?}");
        assert!(finished.stderr.contains(words), "{finished:?}");
    }
    let file = lab.path("a.toml");
    let text = "[[export]]\nspec = \"a=mem:1M\"\nvhost-socket-mode = 0o661\nublk = \"no\"\n";
    std::fs::write(&file, text).unwrap();
    let server = lab.serve(&["--config", &file.display().to_string()]);
    let socket = lab.path("run/exports/a/vhost-user-blk");
    assert_eq!(access(&socket).0, 0o661, "an octal number in a file is one");
    server.stop().unwrap();
    // A link in place of a socket is neither followed nor replaced.
    let (target, link) = (lab.path("target"), lab.path("link"));
    std::fs::write(&target, "x").unwrap();
    symlink(&target, &link).unwrap();
    let spec = format!(
        "a=mem:1M,vhost-socket-mode=0666,vhost-socket={}",
        link.display()
    );
    let before = access(&target);
    lab.serve_fails(&["--ublk", "no", &spec], 1, &["exists and is not a socket"]);
    assert_eq!(access(&target), before);
    lab.is_clean();
}

#[test]
fn a_member_of_the_group_of_the_admin_socket_uses_the_commands() {
    if !geteuid().is_root() {
        eprintln!("skipped: only root can become another user");
        return;
    }
    let lab = sandbox();
    let top = lab.path("run");
    std::fs::set_permissions(top.parent().unwrap(), PermissionsExt::from_mode(0o755)).unwrap();
    // Where the program was built need not be open to others.
    let program = lab.path("ublkup");
    std::fs::copy(env!("CARGO_BIN_EXE_ublkup"), &program).unwrap();
    let server = lab.serve(&["--ublk", "no", "--admin-socket-group=1", "a=mem:1M"]);
    let run = |group: &str, args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args([
            "--reuid=65534",
            &format!("--regid={group}"),
            "--clear-groups",
        ]);
        command
            .arg(&program)
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", &top);
        let output = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    for args in [&["list"][..], &["stat", "a"]] {
        let (code, out, err) = run("1", args);
        assert_eq!(code, Some(0), "{args:?}: {err}");
        assert!(out.contains('a'), "{out}");
        let (code, _, err) = run("2", args);
        assert_eq!(code, Some(1));
        assert!(err.contains("another user's"), "{err}");
    }
    let (code, _, err) = run("1", &["stop", "a"]);
    assert_eq!(code, Some(0), "{err}");
    drop(server);
    lab.is_clean();
}

/// Starts a server as a service manager does that listens for an export of this name.
fn serve_activated(lab: &Sandbox, socket: &UnixListener, name: &str, args: &[&str]) -> Server {
    start(activated(lab, socket, name, args))
}

fn activated(lab: &Sandbox, socket: &UnixListener, name: &str, args: &[&str]) -> Command {
    let serve = lab.command(&[&["serve"], args].concat());
    let mut command = Command::new("sh");
    // The socket becomes descriptor 3, and the process that is told about it the server.
    let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"";
    command
        .args(["-c", script, "sh"])
        .arg(serve.get_program())
        .args(serve.get_args());
    for (key, value) in serve.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    command.env("LISTEN_FDNAMES", name);
    command.stdin(OwnedFd::from(socket.try_clone().unwrap()));
    command
}

#[test]
fn a_client_that_comes_before_the_server_or_between_two_waits() {
    let lab = sandbox();
    let folder = lab.path("run/exports/a");
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join("vhost-user-blk");
    let socket = UnixListener::bind(&path).unwrap();
    assert_eq!(
        lab.ok(&["list"]).lines().count(),
        1,
        "a folder for a socket is no export"
    );
    let client = UnixStream::connect(&path).unwrap();
    let image = lab.image("a.img", 1 << 20).display().to_string();
    let spec = format!("a=file:{image}");
    let args = ["--ublk", "no", "--server-name", "s", &spec];
    let server = serve_activated(&lab, &socket, "a", &args);
    let mut driver = Driver::running(client, USUAL);
    assert_eq!(driver.write(0, &[7; 512]), OK);
    drop(driver);
    server.stop().unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let server = serve_activated(&lab, &socket, "a", &args);
    let mut driver = Driver::running(client, USUAL);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    drop(driver);
    // A crash, and a server that is not told of the socket, which is in its way.
    drop(server);
    let client = UnixStream::connect(&path).unwrap();
    lab.serve_fails(&["--ublk", "no", &spec], 1, &["socket in use"]);
    let server = serve_activated(&lab, &socket, "a", &args);
    let mut driver = Driver::running(client, USUAL);
    assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
    drop(driver);
    server.stop().unwrap();
    UnixStream::connect(&path).unwrap();
    let left: Vec<_> = std::fs::read_dir(&folder).unwrap().collect();
    assert_eq!(left.len(), 1, "only the manager's socket: {left:?}");
}

#[test]
fn a_socket_for_no_export_is_refused_for_its_clients_would_wait_for_ever() {
    let lab = sandbox();
    let path = lab.path("s");
    let socket = UnixListener::bind(&path).unwrap();
    let mut command = activated(&lab, &socket, "b", &["--ublk", "no", "a=mem:1M"]);
    let refused = command.output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("a socket for an export called 'b', and there is none"),
        "{said}"
    );
    let not_listening = UnixStream::connect(&path).unwrap();
    let not_listening = UnixListener::from(OwnedFd::from(not_listening));
    let mut command = activated(&lab, &not_listening, "a", &["--ublk", "no", "a=mem:1M"]);
    let said = String::from_utf8(command.output().unwrap().stderr).unwrap();
    assert!(said.contains("socket 'a' cannot be used"), "{said}");
    lab.is_clean();
}

/// The modes of all sockets in a folder, as far as they stay there.
fn modes_of_sockets(folder: &Path, seen: &mut BTreeSet<(String, u32)>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match std::fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => modes_of_sockets(&path, seen),
            Ok(found) if found.file_type().is_socket() => {
                let name = entry.file_name().to_string_lossy().into_owned();
                seen.insert((name, found.permissions().mode() & 0o777));
            }
            _ => {}
        }
    }
}

#[test]
fn no_socket_is_open_to_others_at_any_moment_of_a_start_without_an_umask() {
    let lab = sandbox();
    let run = lab.path("run");
    let is_done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = BTreeSet::new();
            while !is_done.load(Ordering::Relaxed) {
                modes_of_sockets(&run, &mut seen);
            }
            seen
        });
        for _ in 0..5 {
            let mut command = Command::new("sh");
            let program = env!("CARGO_BIN_EXE_ublkup");
            command
                .args(["-c", "umask 0; exec \"$0\" serve --ublk no \"$@\"", program])
                .args(["a=mem:1M", "b=mem:1M", "c=mem:1M"])
                .env("UBLKUP_RUNTIME_DIR", &run);
            start(command).stop().unwrap();
        }
        is_done.store(true, Ordering::Relaxed);
        watcher.join().unwrap()
    });
    let expected = ["control", "vhost-user-blk"].map(|name| (name.to_owned(), 0o600));
    assert_eq!(seen, BTreeSet::from(expected));
    lab.is_clean();
}
