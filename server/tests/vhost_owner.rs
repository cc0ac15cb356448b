//! Whose disk it is: after a crash, a hand-over or a client's death it is kept for the client that had it,
//! which is known by its in-flight memory, or by its process if it has none.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;
#[path = "common/recorded.rs"]
mod recorded;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use common::*;
use recorded::{Client, new_memory};
use testkit::server::Server;
use ublkup::door::ownership::OwnershipState;
use ublkup::engine::StorageControl;
use ublkup::request::Limits;
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;

/// How a server ends and the next one begins.
const WAYS: [&str; 3] = ["serve", "recover", "take-over"];

/// Longer than any test.
const GRACE: &str = "3600";

/// An image and its servers, which have no ublk door.
struct Disk {
    lab: Sandbox,
    spec: String,
}

impl Disk {
    fn new() -> Self {
        let lab = sandbox();
        let spec = format!("d=file:{}", lab.image("disk.img", 1 << 20).display());
        Self { lab, spec }
    }

    fn serve(&self, more: &[&str]) -> Server {
        let args = ["--ublk", "no", "--reconnect-grace", GRACE, &self.spec];
        self.lab.serve(&[&args, more].concat())
    }

    /// Ends a server and starts the next one.
    fn next(&self, way: &str, old: Server, more: &[&str]) -> Server {
        if way == "take-over" {
            let next = self.serve(&[more, &["--take-over"]].concat());
            assert_eq!(old.exit_code().unwrap(), Some(0));
            return next;
        }
        old.kill().unwrap();
        match way {
            "recover" => self.lab.recover(&["d"]),
            _ => self.serve(more),
        }
    }

    fn connect(&self) -> UnixStream {
        self.lab.connect("d")
    }

    fn stat(&self) -> serde_json::Value {
        serde_json::from_str(&self.lab.ok(&["stat", "d", "--json"])).unwrap()
    }

    /// Another client, of this process and of another one, is refused; its memory is of this server.
    fn refuses_impostors(&self, server: &Server) {
        let stat = self.stat();
        assert_eq!(stat["access"], "waiting");
        let kept_for = stat["kept_for"]["client"].as_str().unwrap();
        assert!(kept_for.contains(&format!("of process {}", std::process::id())));
        let mut impostor = Client::connect(self.connect(), USUAL);
        assert!(!impostor.start(), "an impostor with memory got the disk");
        let said = format!("the disk is kept for {kept_for} for ");
        eventually("the log says for whom", || server.log().contains(&said));
        self.refuses_another_process();
    }

    fn refuses_another_process(&self) {
        assert!(!self.another_process_takes_it().success());
        assert_eq!(self.stat()["access"], "waiting");
    }

    /// A disk, its server with these options, and a client that has the disk.
    fn with_client(options: &[&str]) -> (Self, Server, Client) {
        let disk = Self::new();
        let server = disk.serve(options);
        let mut client = Client::connect(disk.connect(), USUAL);
        assert!(client.start());
        (disk, server, client)
    }

    /// A client without memory in a process of its own, which ends without stopping.
    fn another_process_takes_it(&self) -> ExitStatus {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_process"])
            .env(SOCKET, self.lab.path("run/exports/d/vhost-user-blk"))
            .output()
            .unwrap()
            .status
    }
}

/// Where [`another_process`] connects. Without it that test has nothing to do.
const SOCKET: &str = "UBLKUP_TEST_SOCKET";

/// No test of its own: the others run it in another process.
#[test]
fn another_process() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    let stream = UnixStream::connect(Path::new(&socket)).unwrap();
    let mut driver = Driver::running(stream, USUAL);
    assert_eq!(driver.write(8, &[7; 512]), OK);
}

#[test]
fn a_client_that_may_come_back_finds_the_file_that_it_had_or_no_server() {
    for way in WAYS {
        let (disk, server, mut owner) = Disk::with_client(&[]);
        assert_eq!(owner.driver.write(0, &[1; 512]), OK);
        let (image, aside) = (disk.lab.path("disk.img"), disk.lab.path("aside.img"));
        std::fs::rename(&image, &aside).unwrap();
        let _other = disk.lab.image("disk.img", 1 << 20);
        let other = "is not the one that was served";
        let grace = ["--ublk", "no", "--reconnect-grace", GRACE];
        let next = match way {
            "take-over" => [&["serve"], &grace[..], &[&disk.spec, "--take-over"]].concat(),
            "recover" => vec!["recover", "d"],
            _ => [&["serve"], &grace[..], &[&disk.spec]].concat(),
        };
        let mut old = None;
        match way {
            "take-over" => old = Some(server),
            _ => drop(server.kill().unwrap()),
        }
        // Also at the second attempt.
        for _ in 0..2 {
            disk.lab.fails(&next, 1, &[other]);
        }
        if way == "serve" {
            // On a person's word, who knows that the client has ended.
            let server = disk.serve(&["--replace"]);
            assert_eq!(disk.stat()["access"], "free");
            server.stop().unwrap();
            continue;
        }
        std::fs::rename(&aside, &image).unwrap();
        let server = match old {
            Some(old) => disk.next(way, old, &[]),
            None => disk.lab.recover(&["d"]),
        };
        let mut owner = owner.reconnect(|| disk.connect());
        assert!(owner.start(), "after {way}");
        assert_eq!(owner.driver.read(0, 512), (OK, vec![1; 512]));
        drop(owner);
        server.stop().unwrap();
    }
}

#[test]
fn a_client_with_memory_gets_its_disk_back_from_the_next_server_and_no_other_does() {
    for way in WAYS {
        let (disk, server, mut owner) = Disk::with_client(&[]);
        assert_eq!(owner.driver.write(0, &[1; 512]), OK);
        let server = disk.next(way, server, &[]);
        disk.refuses_impostors(&server);
        let mut owner = owner.reconnect(|| disk.connect());
        assert!(owner.start(), "after {way}");
        assert_eq!(owner.driver.read(0, 512), (OK, vec![1; 512]));
        drop(owner);
        server.stop().unwrap();
        disk.lab.is_clean();
    }
}

#[test]
fn a_client_without_memory_is_known_by_its_process() {
    for way in WAYS {
        let disk = Disk::new();
        let server = disk.serve(&[]);
        let owner = Driver::running(disk.connect(), USUAL);
        let server = disk.next(way, server, &[]);
        disk.refuses_another_process();
        let mut owner = owner.reconnect(|| disk.connect());
        owner.start(0, 0);
        assert_eq!(owner.read(0, 512).0, OK, "after {way}");
        drop(owner);
        server.stop().unwrap();
    }
}

#[test]
fn no_descriptor_of_a_server_is_inherited_by_what_it_might_start() {
    let (_disk, server, client) = Disk::with_client(&["--migration"]);
    expect_all_close_on_exec(server.pid());
    drop(client);
    server.stop().unwrap();
}

#[test]
fn a_server_that_fails_to_start_forgets_no_client() {
    let (disk, server, owner) = Disk::with_client(&[]);
    server.kill().unwrap();
    let (image, away) = (disk.lab.path("disk.img"), disk.lab.path("away.img"));
    std::fs::rename(&image, &away).unwrap();
    disk.lab
        .serve_fails(&["--ublk", "no", &disk.spec], 1, &["disk.img"]);
    std::fs::rename(&away, &image).unwrap();
    let server = disk.serve(&[]);
    disk.refuses_impostors(&server);
    let mut owner = owner.reconnect(|| disk.connect());
    assert!(owner.start());
    drop(owner);
    server.stop().unwrap();
}

#[test]
fn the_disk_of_a_client_that_died_is_kept_for_it() {
    let (disk, server, owner) = Disk::with_client(&[]);
    let mut owner = owner.reconnect(|| disk.connect());
    eventually("its death is noticed", || {
        disk.stat()["access"] == "waiting"
    });
    disk.refuses_impostors(&server);
    assert!(owner.start());
    // One that stops its vrings has left.
    owner.driver.frontend.get_vring_base(0).unwrap();
    drop(owner);
    eventually("it leaves", || disk.stat()["access"] == "free");
    // A process that has ended does not come back, unless another one has its memory.
    assert!(disk.another_process_takes_it().success());
    let mut next = Client::connect(disk.connect(), USUAL);
    assert!(next.start());
    assert_eq!(next.driver.read(8, 512), (OK, vec![7; 512]));
    drop(next);
    server.stop().unwrap();
}

#[test]
fn a_guest_that_boots_while_its_server_is_replaced_gets_its_disk_with_new_memory() {
    let (disk, server, owner) = Disk::with_client(&[]);
    owner.driver.frontend.get_vring_base(0).unwrap();
    server.kill().unwrap();
    let server = disk.serve(&[]);
    disk.refuses_another_process();
    let mut owner = owner.reconnect(|| disk.connect());
    (owner.told, owner.memory) = new_memory(&mut owner.driver);
    assert!(owner.start());
    // From now on it is known by that.
    server.kill().unwrap();
    let server = disk.serve(&[]);
    disk.refuses_impostors(&server);
    let mut owner = owner.reconnect(|| disk.connect());
    assert!(owner.start());
    drop(owner);
    server.stop().unwrap();
}

#[test]
fn the_source_of_a_migration_does_not_get_the_disk_back() {
    for way in WAYS {
        let (disk, server, mut source) = Disk::with_client(&["--migration"]);
        let mut target = Client::connect(disk.connect(), USUAL);
        source.stop_to_migrate();
        assert_eq!(disk.stat()["access"], "moving");
        assert!(target.start());
        assert_eq!(target.driver.write(0, &[2; 512]), OK);
        let server = disk.next(way, server, &["--migration"]);
        // It is the first that comes.
        let mut source = source.reconnect(|| disk.connect());
        assert!(!source.start(), "after {way}");
        let said = "another client took the disk over from this one in a migration";
        eventually("the log says why", || server.log().contains(said));
        let mut target = target.reconnect(|| disk.connect());
        assert!(target.start(), "after {way}");
        assert_eq!(target.driver.read(0, 512), (OK, vec![2; 512]));
        // Not even when the target has left.
        target.driver.frontend.get_vring_base(0).unwrap();
        drop(target);
        eventually("it leaves", || disk.stat()["access"] == "free");
        let mut source = source.reconnect(|| disk.connect());
        assert!(!source.start(), "after {way}");
        assert!(Client::connect(disk.connect(), USUAL).start());
        server.stop().unwrap();
    }
}

#[test]
fn a_server_that_dies_in_the_middle_of_a_migration_leaves_the_disk_to_the_target() {
    let (disk, server, mut source) = Disk::with_client(&["--migration"]);
    let target = Client::connect(disk.connect(), USUAL);
    source.stop_to_migrate();
    server.kill().unwrap();
    let server = disk.serve(&["--migration"]);
    let kept_for = disk.stat()["kept_for"]["client"].to_string();
    assert!(
        kept_for.contains("the target of the migration of"),
        "{kept_for}"
    );
    let mut source = source.reconnect(|| disk.connect());
    assert!(!source.start());
    let said = "the disk is kept for the target for ";
    eventually("the log says why", || server.log().contains(said));
    let mut target = target.reconnect(|| disk.connect());
    assert!(target.start());
    drop((source, target));
    server.stop().unwrap();
}

#[test]
fn a_source_whose_connection_ends_in_the_middle_of_a_migration_leaves_the_disk_to_the_target() {
    let (disk, server, mut source) = Disk::with_client(&["--migration"]);
    let mut target = Client::connect(disk.connect(), USUAL);
    source.stop_to_migrate();
    let mut source = source.reconnect(|| disk.connect());
    eventually("it is kept", || {
        let kept_for = disk.stat()["kept_for"]["client"].to_string();
        kept_for.contains("the target of the migration of")
    });
    assert!(!source.start());
    assert!(target.start());
    drop((source, target));
    server.stop().unwrap();
}

/// Storage that another server has for a while, or that takes its time to be flushed.
struct Slow {
    claims: Mutex<()>,
    releases: Mutex<()>,
}

impl Slow {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            claims: Mutex::new(()),
            releases: Mutex::new(()),
        })
    }
}

impl StorageControl for Slow {
    fn limits(&self) -> &Limits {
        unreachable!("ownership does not ask for limits")
    }

    fn claim(&self, _: Duration) -> Result<bool, String> {
        drop(self.claims.lock().unwrap());
        Ok(true)
    }

    fn release(&self) {
        drop(self.releases.lock().unwrap());
    }
}

fn serves(fixture: &Fixture) {
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.read(0, 512).0, OK);
    driver.frontend.get_vring_base(0).unwrap();
    drop(driver);
    fixture.wait_empty();
}

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1)
}

#[test]
fn a_client_whose_start_is_slow_holds_up_no_other_export() {
    let (slow, other) = (fixture(), fixture());
    let storage = Slow::new();
    slow.ownership
        .allow_moves(Some(Arc::<Slow>::clone(&storage)));
    let held_up: MutexGuard<'_, ()> = storage.claims.lock().unwrap();
    std::thread::scope(|scope| {
        let starts = scope.spawn(|| Driver::running(slow.connect(), USUAL).read(0, 512).0);
        eventually("it is being given the disk", || {
            slow.ownership.state() == OwnershipState::Draining
        });
        serves(&other);
        // Others may look at this one.
        drop(Driver::connect(slow.connect(), USUAL));
        assert!(!starts.is_finished());
        drop(held_up);
        assert_eq!(starts.join().unwrap(), OK);
    });
}

#[test]
fn a_disk_that_is_given_back_slowly_holds_up_no_other_export() {
    let (slow, other) = (fixture(), fixture());
    let storage = Slow::new();
    slow.ownership
        .allow_moves(Some(Arc::<Slow>::clone(&storage)));
    drop(Driver::running(slow.connect(), USUAL));
    slow.wait_empty();
    let held_up = storage.releases.lock().unwrap();
    eventually("the grace is over", || {
        slow.ownership.state() == OwnershipState::Draining
    });
    serves(&other);
    drop(held_up);
    eventually("it is given back", || {
        slow.ownership.state() == OwnershipState::Free
    });
}
