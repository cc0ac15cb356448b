//! What a user is told who has asked for the wrong thing. `wrong_usage.txt` has the answers, to be read by people: each
//! says what failed, on what, and what to do. After a change: `UPDATE_ANSWERS=1 cargo test -p ublkup --test wrong_usage`.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

use std::fmt::Write as _;

use common::sandbox;
use testkit::sandbox::Sandbox;

const ANSWERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/wrong_usage.txt");

/// Files that the invocations refer to.
const FILES: [(&str, &str); 6] = [
    ("key.toml", "[[export]]\nspec = 'mem:1M'\nqueus = 2\n"),
    ("no-spec.toml", "[[export]]\n"),
    (
        "value.toml",
        "[defaults]\nqueues = 0\n[[export]]\nspec = 'mem:1M'\n",
    ),
    ("syntax.toml", "[export\n"),
    ("empty.toml", ""),
    ("small.img", "less than a sector"),
];

/// The answer to a command line, with its exit code. `DIR` is the folder of the files.
fn answer(lab: &Sandbox, line: &str) -> String {
    let folder = lab.path("").display().to_string();
    let folder = folder.trim_end_matches('/');
    let words: Vec<String> = line
        .split(' ')
        .map(|word| word.replace("DIR", folder))
        .collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let finished = lab.finish(&words, &[]);
    let here = std::env::current_dir().unwrap();
    let mut text = (finished.stdout + &finished.stderr)
        .replace(folder, "DIR")
        .replace(&here.display().to_string(), "HERE");
    // Which processors there are differs.
    if let Some(at) = text.find("give some of ") {
        text.truncate(at);
        text += "give some of …\n";
    }
    let code = finished.status.code().unwrap();
    format!("$ ublkup {line}\n{}\n[{code}]\n\n", text.trim_end())
}

#[test]
fn each_wrong_invocation_is_told_what_failed_on_what_and_what_to_do() {
    let lab = sandbox();
    for (name, text) in FILES {
        std::fs::write(lab.path(name), text).unwrap();
    }
    drop(lab.image("disk.img", 1 << 20));
    std::fs::create_dir(lab.path("folder")).unwrap();
    let mut known = std::fs::read_to_string(ANSWERS).unwrap();
    let lines = known
        .lines()
        .filter_map(|line| line.strip_prefix("$ ublkup "));
    let (mut got, mut count) = (String::new(), 0);
    for line in lines {
        write!(got, "{}", answer(&lab, line)).unwrap();
        count += 1;
    }
    if std::env::var_os("UPDATE_ANSWERS").is_some() {
        std::fs::write(ANSWERS, &got).unwrap();
        known.clone_from(&got);
    }
    assert!(count >= 60, "{count} invocations");
    for (was, is) in known.split("\n\n").zip(got.split("\n\n")) {
        assert_eq!(
            is, was,
            "run it with UPDATE_ANSWERS=1, and read what it writes"
        );
    }
    assert!(!got.contains("panicked") && !got.contains("[0]"), "{got}");
    lab.is_clean();
}

#[test]
fn without_a_command_the_help_is_shown() {
    let lab = sandbox();
    let finished = lab.finish(&[], &[]);
    assert_eq!(finished.status.code(), Some(2));
    let help = finished.stderr;
    assert!(
        help.contains("serve") && !help.contains("device-"),
        "{help}"
    );
}
