//! Clients whose process has ended: only another process that has their memory could come in their place.

use super::super::MemoryId;
use super::super::state::SUCCESSION_LIMIT;
use super::*;
use crate::engine::process::Process;

fn with(inode: u64, process: Option<Process>) -> Client {
    let memory = Some(MemoryId { device: 1, inode });
    Client {
        identity: Identity { memory, process },
        ..client(&format!("{inode}"))
    }
}

fn ended() -> Option<Process> {
    let mut child = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    let process = Process::of(i32::try_from(child.id()).unwrap());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(process.is_some_and(|process| !process.is_running()));
    process
}

fn kept(process: Option<Process>, grace: Duration) -> (Arc<Ownership>, Arc<Door>) {
    let (access, door) = export(grace);
    drop(access.take(with(1, process)).unwrap());
    assert_eq!(access.state(), OwnershipState::Waiting);
    (access, door)
}

#[test]
fn another_client_waits_for_the_end_of_a_short_grace() {
    let (access, _) = kept(ended(), Duration::from_secs(1));
    let lease = access.take(with(2, None)).unwrap();
    assert_eq!(access.holder().as_deref(), Some("2"));
    lease.leave();
}

#[test]
fn the_memory_of_an_ended_process_is_recognised_while_others_wait() {
    let (access, _) = kept(ended(), SUCCESSION_LIMIT);
    let other = std::thread::spawn({
        let access = Arc::clone(&access);
        move || access.take(with(2, None)).map(drop)
    });
    let lease = access.take(with(1, None)).unwrap();
    let refused = other.join().unwrap().unwrap_err();
    assert_eq!(refused, Refused::Taken("1".into()));
    lease.leave();
}

#[test]
fn others_are_refused_at_once_for_a_long_time_or_while_the_process_lives() {
    let alive = Process::of(std::process::id().cast_signed());
    for (process, grace) in [(ended(), LONG), (alive, SUCCESSION_LIMIT)] {
        let (access, _) = kept(process, grace);
        let refused = access.take(with(2, None)).unwrap_err();
        assert!(matches!(refused, Refused::Kept { .. }), "{refused}");
        assert_eq!(access.state(), OwnershipState::Waiting);
    }
}
