//! `ublkup-pipe` as a shell runs it: with itself, with programs that have no rings, and killed.

#[path = "common/random.rs"]
mod random;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS};
use random::Random;
use tempfile::TempDir;
use testkit::seccomp::filter;

const TIMEOUT: Duration = Duration::from_secs(60);

/// The transport under test: see `common`.
fn transport() -> String {
    std::env::var("RING_TESTS_TRANSPORT").unwrap_or("shared".to_owned())
}

/// The example, which is built here if cargo built this test alone.
fn program() -> PathBuf {
    let test = std::env::current_exe().expect("this program's path");
    let target = test.ancestors().nth(2).expect("the target directory");
    let path = target.join("examples/ublkup-pipe");
    if !path.exists() {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--package", "fd-ring", "--example", "ublkup-pipe"])
            .status();
        assert!(built.expect("cargo runs").success(), "ublkup-pipe builds");
    }
    path
}

struct Place {
    dir: TempDir,
    /// A file, and what is in it.
    data: PathBuf,
    bytes: Vec<u8>,
}

impl Place {
    fn new(len_bytes: usize) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let numbers = std::iter::repeat_with(|| random.next().to_le_bytes());
        let bytes: Vec<u8> = numbers.flatten().take(len_bytes).collect();
        let data = dir.path().join("data");
        std::fs::write(&data, &bytes).expect("written");
        Self { dir, data, bytes }
    }

    fn ours(&self, role: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args([role, "--stats", "--way", &transport(), "--runtime-dir"]);
        command.arg(self.dir.path()).args(args);
        command
    }

    fn produce(&self, args: &[&str]) -> Command {
        let mut command = self.ours("produce", args);
        command.arg(&self.data);
        command
    }
}

/// Starts two programs with a pipe between them; the messages of both can be read.
fn pair(mut first: Command, mut second: Command) -> (Child, Child) {
    let start = |command: &mut Command| {
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("starts")
    };
    let mut first = start(&mut first);
    second.stdin(first.stdout.take().expect("a pipe"));
    (first, start(&mut second))
}

/// Runs such programs; returns the output, and their messages.
fn run(first: Command, second: Command) -> (Vec<u8>, String) {
    let (first, second) = pair(first, second);
    let second = second.wait_with_output().expect("ended");
    let first = first.wait_with_output().expect("ended");
    let said = [first.stderr, second.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    assert!(first.status.success() && second.status.success(), "{said}");
    (second.stdout, said)
}

fn dd() -> Command {
    let mut dd = Command::new("dd");
    dd.args(["bs=777", "status=none"]);
    dd
}

fn cat(file: Option<&Path>) -> Command {
    let mut cat = Command::new("cat");
    cat.args(file);
    cat
}

#[test]
fn the_same_bytes_arrive_whichever_end_has_rings() {
    let place = Place::new(5_000_011);
    let (produce, consume) = (|| place.produce(&[]), || place.ours("consume", &[]));
    let (source, records) = (|| cat(Some(&place.data)), ["--records", "16"]);
    let mut plain = Command::new(program());
    plain.args(["consume", "--way", "plain"]);
    let table = [
        ("both", produce(), consume(), 2),
        (
            "records",
            place.produce(&records),
            place.ours("consume", &records),
            2,
        ),
        ("the first alone", produce(), cat(None), 0),
        ("the second alone", source(), consume(), 0),
        ("its records", source(), place.ours("consume", &records), 0),
        ("the second not", produce(), plain, 0),
        ("blocks", place.produce(&["--records", "777"]), dd(), 0),
        ("neither", source(), cat(None), 0),
    ];
    for (what, first, second, upgraded) in table {
        let (got, said) = run(first, second);
        assert!(got == place.bytes, "{what}: {said}");
        let seen = said.matches(&format!("way={}", transport())).count();
        assert_eq!(seen, upgraded, "{what}: {said}");
    }
}

#[test]
fn plain_programs_before_and_after_in_the_same_pipe_keep_their_order() {
    let place = Place::new(300_000);
    let program = program();
    let (program, dir, data) = (
        program.display(),
        place.dir.path().display(),
        place.data.display(),
    );
    let ours = format!("--way {} --runtime-dir {dir}", transport());
    let script = format!(
        "{{ echo before; {program} produce {ours} {data}; echo between; {program} produce {ours} {data}; echo after; }} \
         | {program} consume {ours} > {dir}/out"
    );
    let done = Command::new("sh")
        .args(["-c", &script])
        .status()
        .expect("a shell");
    assert!(done.success());
    let data = &place.bytes[..];
    let expected = [b"before\n", data, b"between\n", data, b"after\n"].concat();
    let got = std::fs::read(place.dir.path().join("out")).expect("read");
    assert!(
        got == expected,
        "{} bytes, not {}",
        got.len(),
        expected.len()
    );
}

/// `2>&1`: beside a ring they would be elsewhere, or refused.
#[test]
fn messages_of_a_producer_are_in_the_stream_if_both_go_to_one_pipe() {
    let place = Place::new(300_000);
    let (program, dir) = (program(), place.dir.path().display());
    let (program, data) = (program.display(), place.data.display());
    let ours = format!("--way {} --runtime-dir {dir}", transport());
    let script = format!(
        "{program} produce --wait 1 --stats {ours} {data} 2>&1 | {program} consume {ours} > {dir}/out"
    );
    let mut shell = Command::new("sh");
    let mut shell = shell.args(["-c", &script]).spawn().expect("a shell");
    assert!(ended(&mut shell).success());
    let got = std::fs::read(place.dir.path().join("out")).expect("read");
    let (stream, said) = got.split_at(place.bytes.len().min(got.len()));
    let said = String::from_utf8_lossy(said);
    assert!(stream == place.bytes, "{} bytes", got.len());
    assert!(said.contains("way=plain"), "{said}");
}

#[test]
fn the_system_calls_of_the_kernels_ring_are_made_only_if_asked_for() {
    let place = Place::new(300_000);
    let forbidden = |role: &str, args: &[&str]| {
        let mut command = Command::new(program());
        command.args([role, "--stats", "--wait", "5", "--runtime-dir"]);
        command.arg(place.dir.path()).args(args);
        let forbid = || filter([473, 474], SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW);
        // SAFETY: between fork and exec it makes two system calls, and uses nothing but its own stack.
        unsafe { command.pre_exec(forbid) };
        command
    };
    let data = place.data.to_str().expect("text");
    let (got, said) = run(forbidden("produce", &[data]), forbidden("consume", &[]));
    assert!(got == place.bytes, "{said}");
    assert_eq!(said.matches("way=shared").count(), 2, "{said}");
    // The filter works: it kills a process that asks.
    for ask in [&["--kernel"][..], &["--way", "kernel"]] {
        let mut asking = forbidden("consume", ask);
        let (pipe, _writer) = io::pipe().expect("a pipe");
        let status = asking.stdin(pipe).stdout(Stdio::null()).status();
        assert_eq!(
            status.expect("starts").signal(),
            Some(libc::SIGSYS),
            "{ask:?}"
        );
    }
}

/// Waits for a child, with a limit.
fn ended(child: &mut Child) -> std::process::ExitStatus {
    let limit = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().expect("asked") {
            return status;
        }
        assert!(Instant::now() < limit, "the peer of a killed end hangs");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A pair on a pipe, with an endless source and a file as the target.
fn endless(place: &Place) -> (Child, Child, PathBuf) {
    let mut first = place.ours("produce", &["--wait", "5"]);
    first.stdin(File::open("/dev/zero").expect("opened"));
    let mut first = first
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let pipe = first.stdout.take().expect("a pipe");
    let out = place.dir.path().join("out");
    let mut second = place.ours("consume", &[]);
    second.stdin(pipe).stderr(Stdio::null());
    second.stdout(File::create(&out).expect("made"));
    (first, second.spawn().expect("starts"), out)
}

#[test]
fn the_peer_of_a_killed_end_ends_too_at_any_moment() {
    let place = Place::new(0);
    for round in 0..16_u64 {
        let (mut first, mut second, out) = endless(&place);
        // From the negotiation to well into the stream.
        std::thread::sleep(Duration::from_micros(500 * round * round));
        let (victim, survivor) = match round % 2 {
            0 => (&mut first, &mut second),
            _ => (&mut second, &mut first),
        };
        victim.kill().expect("killed");
        victim.wait().expect("ended");
        let status = ended(survivor);
        // A consumer sees the end of the stream; a producer a broken pipe.
        assert_eq!(status.success(), round % 2 == 0, "round {round}");
        std::fs::remove_file(out).expect("removed");
    }
}

#[test]
fn a_producer_whose_consumer_pauses_waits_and_loses_nothing() {
    // The consumer waits for its own reader; the producer fills the ring and sleeps.
    let place = Place::new(3_000_000);
    let wait = ["--wait", "5"];
    let (mut first, mut second) = pair(place.produce(&wait), place.ours("consume", &wait));
    let mut out = second.stdout.take().expect("a pipe");
    let mut part = [0; 1000];
    out.read_exact(&mut part).expect("read");
    std::thread::sleep(Duration::from_millis(100));
    assert!(
        first.try_wait().expect("asked").is_none(),
        "3 MB are in flight"
    );
    let mut all = part.to_vec();
    out.read_to_end(&mut all).expect("read");
    assert!(all == place.bytes);
    let said = first.wait_with_output().expect("ended").stderr;
    let said = String::from_utf8_lossy(&said);
    assert!(said.contains(&format!("way={}", transport())), "{said}");
    assert!(ended(&mut second).success());
}

/// Runs programs and a `head` that stops early; returns how the others ended, and the output.
fn cut_short(mut programs: Vec<Command>) -> (Vec<std::process::ExitStatus>, Vec<u8>) {
    let mut head = Command::new("head");
    head.args(["-c", "5000"]);
    programs.push(head);
    let mut children: Vec<Child> = Vec::new();
    for mut program in programs {
        if let Some(before) = children.last_mut() {
            program.stdin(before.stdout.take().expect("a pipe"));
        }
        program.stdout(Stdio::piped()).stderr(Stdio::null());
        children.push(program.spawn().expect("starts"));
    }
    let mut last = children.pop().expect("head");
    let mut out = Vec::new();
    let mut pipe = last.stdout.take().expect("a pipe");
    pipe.read_to_end(&mut out).expect("read");
    assert!(ended(&mut last).success());
    (children.iter_mut().map(ended).collect(), out)
}

#[test]
fn all_programs_end_when_the_last_one_has_enough() {
    let place = Place::new(3_000_000);
    let wanted = &place.bytes[..5000];
    let waiting = ["--wait", "5"];
    // One end alone uses the pipe: the writer gets EPIPE, or SIGPIPE if it is another program.
    let (statuses, out) = cut_short(vec![place.produce(&[])]);
    assert!(out == wanted && !statuses[0].success(), "{statuses:?}");
    let (statuses, out) = cut_short(vec![cat(Some(&place.data)), place.ours("consume", &[])]);
    assert!(out == wanted && !statuses[1].success(), "{statuses:?}");
    assert_eq!(statuses[0].signal(), Some(libc::SIGPIPE));
    // A ring: the end of the consumer is the end of the producer.
    let both = vec![place.produce(&waiting), place.ours("consume", &waiting)];
    let (statuses, out) = cut_short(both);
    assert!(out == wanted, "{} bytes", out.len());
    assert!(
        statuses.iter().all(|status| !status.success()),
        "{statuses:?}"
    );
}

#[test]
fn a_plain_writer_after_a_ring_gets_sigpipe() {
    let place = Place::new(300_000);
    let (program, dir) = (program(), place.dir.path().display());
    let (program, data) = (program.display(), place.data.display());
    let ours = format!("--wait 5 --stats --way {} --runtime-dir {dir}", transport());
    let script = format!(
        "{{ {program} produce {ours} {data}; cat /dev/zero; echo $? > {dir}/status; }} \
         | {program} consume {ours} 2> {dir}/said | head -c 400000 > {dir}/out"
    );
    let mut shell = Command::new("sh");
    let mut shell = shell.args(["-c", &script]).spawn().expect("a shell");
    assert!(ended(&mut shell).success());
    let read = |name| std::fs::read(place.dir.path().join(name)).expect("read");
    let said = String::from_utf8(read("said")).expect("words");
    assert!(said.contains(&format!("way={}", transport())), "{said}");
    let (expected, got) = ([&place.bytes[..], &[0; 100_000]].concat(), read("out"));
    assert!(got == expected, "{} bytes", got.len());
    let status = String::from_utf8(read("status")).expect("a number");
    assert_eq!(status.trim(), (128 + libc::SIGPIPE).to_string());
}
