//! What another user has put where commands of `ublkup` look: links, sockets, text for the terminal.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use common::sandbox;
use rustix::fs::{FlockOperation, flock};
use rustix::process::geteuid;
use testkit::sandbox::Sandbox;

/// The files of a folder, with their text.
fn contents(folder: &Path) -> Vec<(PathBuf, String)> {
    let entries = fs::read_dir(folder).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read_to_string(&path).unwrap()))
        .collect();
    files.sort();
    files
}

#[test]
fn every_command_refuses_a_link_in_place_of_an_exports_folder() {
    let lab = sandbox();
    let precious = lab.path("precious");
    fs::create_dir(&precious).unwrap();
    for (name, text) in [
        ("control", "text"),
        ("vhost-user-blk", "text"),
        ("lock", ""),
        ("served", r#"{"spec":"a=null:1G"}"#),
        ("ublk-id", "7 7 7\n"),
        (".served.new", "text"),
    ] {
        fs::write(precious.join(name), text).unwrap();
    }
    let before = contents(&precious);
    fs::create_dir_all(lab.path("run/exports")).unwrap();
    symlink(&precious, lab.path("run/exports/a")).unwrap();
    for args in [
        &["serve", "a=null:1G", "--ublk", "no"][..],
        &["serve", "--take-over", "a=null:1G", "--ublk", "no"],
        &["serve", "--replace", "a=null:1G", "--ublk", "no"],
        &["recover", "a"],
        &["recover", "--take-over", "a"],
        &["list"],
        &["stat", "a"],
        &["stop", "a"],
        &["stop", "--force", "a"],
        &["resize", "a", "2G"],
    ] {
        lab.fails(args, 1, &["run/exports/a is not trusted", "symbolic link"]);
    }
    for args in [&["doctor"][..], &["doctor", "--clean"]] {
        let found = lab.finish(args, &[]).stdout;
        assert!(found.contains("run/exports/a is not trusted"), "{found}");
    }
    assert_eq!(contents(&precious), before);
}

#[test]
fn commands_that_ask_a_running_server_do_not_follow_a_link_in_place_of_an_exports_folder() {
    let lab = sandbox();
    let precious = lab.path("precious");
    fs::create_dir(&precious).unwrap();
    let listener = UnixListener::bind(precious.join("control")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let config = lab.path("ublkup.toml");
    let text = "[defaults]\nublk = \"no\"\n[[export]]\nname = \"b\"\nspec = \"null:1G\"\n";
    fs::write(&config, text).unwrap();
    let config_arg = config.display().to_string();
    let server = lab.serve(&["--server-name", "s", "--config", &config_arg]);
    symlink(&precious, lab.path("run/exports/a")).unwrap();
    let added = "[[export]]\nname = \"a\"\nspec = \"null:1G\"\n";
    fs::write(&config, format!("{text}{added}")).unwrap();
    let words = ["run/exports/a is not trusted", "symbolic link"];
    for args in [
        &["set", "a", "iops-total=5"][..],
        &["add", "--ublk", "no", "a=null:1G"],
        &["reload"],
        &["stat", "a"],
        &["list"],
    ] {
        lab.fails(args, 1, &words);
    }
    lab.fails(&["events", "a"], 1, &["has no export called 'a'"]);
    let metrics = lab.finish(&["metrics"], &[]);
    assert!(
        words.iter().all(|word| metrics.stderr.contains(word)),
        "{metrics:?}"
    );
    assert!(metrics.stdout.contains("export=\"b\""), "{metrics:?}");
    let mut top = lab
        .command(&["top"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let told = lines
        .map_while(Result::ok)
        .any(|line| words.iter().all(|word| line.contains(word)));
    top.kill().unwrap();
    top.wait().unwrap();
    assert!(told, "top ended");
    let asked = listener.accept().unwrap_err();
    assert_eq!(
        asked.kind(),
        ErrorKind::WouldBlock,
        "a command asked what is not the server's"
    );
    let left: Vec<_> = fs::read_dir(&precious).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    fs::remove_file(lab.path("run/exports/a")).unwrap();
    server.stop().unwrap();
    lab.is_clean();
}

/// Another user who is not root.
const OTHER: u32 = 65534;

/// What may be wrong with a folder.
#[derive(Clone, Copy, Debug)]
enum Wrong {
    Link,
    Mode,
    Owner,
}

/// Makes a folder untrusted while `body` runs; says why it is.
fn while_wrong(lab: &Sandbox, folder: &Path, wrong: Wrong, body: impl FnOnce(&str)) {
    let mode = |mode| fs::set_permissions(folder, fs::Permissions::from_mode(mode)).unwrap();
    let away = lab.path("away");
    match wrong {
        Wrong::Link => {
            fs::rename(folder, &away).unwrap();
            symlink(&away, folder).unwrap();
            body("symbolic link");
            fs::remove_file(folder).unwrap();
            fs::rename(&away, folder).unwrap();
        }
        Wrong::Mode => {
            mode(0o777);
            body("may write to it");
            mode(0o755);
        }
        Wrong::Owner => {
            chown(folder, Some(OTHER), None).unwrap();
            body("belongs to");
            chown(folder, Some(0), None).unwrap();
        }
    }
}

#[test]
fn no_command_acts_on_folders_of_servers_spares_and_records_that_others_have_in_hand() {
    const ADD: &[&str] = &["add", "--ublk", "no", "c=null:1G"];
    const RELOAD: &[&str] = &["reload"];
    const EVENTS: &[&str] = &["events"];
    const SERVE: &[&str] = &["serve", "--ublk", "no", "--server-name", "t", "c=null:1G"];
    const SERVE_SAME: &[&str] = &["serve", "--ublk", "no", "--server-name", "s", "c=null:1G"];
    const RECOVER: &[&str] = &["recover", "d"];
    let mut all = vec![Wrong::Link, Wrong::Mode];
    // To give files away takes root.
    all.extend(geteuid().is_root().then_some(Wrong::Owner));
    let lab = sandbox();
    let image = lab.image("d.img", 1 << 20).display().to_string();
    let dead = lab.serve(&["--ublk", "no", &format!("d={image}")]);
    dead.kill().unwrap();
    let config = lab.path("ublkup.toml");
    let text = "[defaults]\nublk = \"no\"\n[[export]]\nname = \"b\"\nspec = \"null:1G\"\n";
    fs::write(&config, text).unwrap();
    let config = config.display().to_string();
    let server = lab.serve(&["--server-name", "s", "--config", &config]);
    for (place, commands) in [
        ("servers", &[SERVE, ADD, RELOAD, EVENTS][..]),
        ("servers/s", &[SERVE_SAME, ADD, RELOAD, EVENTS]),
        ("servers/s/spare", &[ADD]),
        ("records", &[SERVE, ADD, RELOAD, RECOVER]),
    ] {
        let folder = lab.path("run").join(place);
        for wrong in &all {
            while_wrong(&lab, &folder, *wrong, |why| {
                let before = names(&lab.path("run"));
                for args in commands {
                    let told = format!("run/{place} is not trusted");
                    println!("{place}, {wrong:?}: {args:?}");
                    lab.fails(args, 1, &[&told, why]);
                }
                assert_eq!(names(&lab.path("run")), before, "{place}, {wrong:?}");
            });
        }
    }
    // All is well again.
    lab.ok(ADD);
    assert_eq!(lab.ok(RELOAD), "nothing has changed\n");
    server.stop().unwrap();
    lab.ok(&["doctor", "--clean"]);
    lab.is_clean();
}

/// All that is in a folder, by path.
fn names(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(names(&path));
        }
        found.push(path);
    }
    found.sort();
    found
}

/// A socket at `path` that no server accepts from, with a full backlog.
fn planted(path: &Path) -> (UnixListener, Vec<UnixStream>) {
    let listener = UnixListener::bind(path).unwrap();
    let mut waiting = Vec::new();
    while let Ok(client) = upgrade_proto::connect_within(path, Duration::from_millis(1)) {
        waiting.push(client);
    }
    (listener, waiting)
}

#[test]
fn a_planted_socket_with_a_full_backlog_holds_up_no_start() {
    let lab = sandbox();
    let path = lab.path("socket");
    let _planted = planted(&path);
    let socket = path.display().to_string();
    let args = ["null:1G", "--ublk", "no", "--vhost-socket", &socket];
    lab.serve_fails(&args, 1, &["socket in use"]);
    lab.is_clean();
}

/// An export `a` whose server is this process, which sends `answer` to one client.
fn answer_once(lab: &Sandbox, answer: &'static str) -> std::thread::JoinHandle<()> {
    let folder = lab.path("run/exports/a");
    fs::create_dir_all(&folder).unwrap();
    let lock = File::create(folder.join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let control = folder.join("control");
    let _stale = fs::remove_file(&control);
    let socket = UnixListener::bind(control).unwrap();
    std::thread::spawn(move || {
        let (mut client, _) = socket.accept().unwrap();
        let _command = client.read(&mut [0; 4096]).unwrap();
        client.write_all(answer.as_bytes()).unwrap();
        drop(lock);
    })
}

#[test]
fn what_a_control_socket_answers_reaches_the_terminal_as_one_line_of_plain_text() {
    let lab = sandbox();
    let server = answer_once(&lab, "{\"error\":\"\\u001b[2J\\nublkup: all is well\"}\n");
    lab.fails(&["stat", "a"], 1, &[r"\u{1b}[2J\nublkup: all is well"]);
    server.join().unwrap();
    // Not JSON: what the parser says of it is the server's text, too.
    let server = answer_once(&lab, "\u{1b}[2J\u{9b}2J\n");
    let told = lab.finish(&["list"], &[]);
    server.join().unwrap();
    let text = told.stdout + &told.stderr;
    assert!(text.contains("makes no sense"), "{text}");
    assert!(
        !text
            .chars()
            .any(|letter| letter.is_control() && letter != '\n'),
        "{text:?}"
    );
}

#[test]
fn names_of_files_and_exports_forge_no_line() {
    let lab = sandbox();
    let path = lab.path("gone\n\u{1b}[2Jublkup: all is well");
    let spec = format!("a=file:{}", path.display());
    lab.serve_fails(&[&spec], 1, &[r"gone\n\u{1b}[2Jublkup: all is well"]);
    fs::create_dir_all(lab.path("run/exports/x\n\u{1b}[2Jy")).unwrap();
    for args in [&["list"][..], &["doctor"], &["doctor", "--clean"]] {
        let told = lab.finish(args, &[]);
        let text = told.stdout + &told.stderr;
        assert!(text.contains(r"x\n\u{1b}[2Jy"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}

#[test]
fn doctor_says_that_nothing_is_served_where_others_may_write() {
    let lab = sandbox();
    let run = lab.path("run");
    fs::create_dir(&run).unwrap();
    lab.ok(&["doctor"]);
    fs::set_permissions(&run, fs::Permissions::from_mode(0o777)).unwrap();
    let told = lab.finish(&["doctor"], &[]);
    assert_eq!(told.status.code(), Some(1), "{told:?}");
    let why = "run is not trusted: its group or others may write to it";
    let line = told
        .stdout
        .lines()
        .find(|line| line.contains("runtime directory"));
    assert!(
        line.is_some_and(|line| line.contains(why)),
        "{}",
        told.stdout
    );
    lab.serve_fails(&["null:1G", "--ublk", "no"], 1, &[why]);
}

#[test]
fn a_wrong_filter_of_the_log_does_not_keep_udev_from_the_owner_of_a_device() {
    let lab = sandbox();
    let env = [("UBLKUP_LOG", "nonsense=everything")];
    let asked = lab.finish(&["device-owner", "ublkc4095"], &env);
    assert_eq!(asked.status.code(), Some(1), "{}", asked.stderr);
    assert!(
        !asked.stderr.contains("error, warn, info"),
        "{}",
        asked.stderr
    );
    let served = lab.finish(&["list"], &env);
    assert_eq!(served.status.code(), Some(2), "{}", served.stderr);
}
