//! Devices that are stopped: by another program, under load, while they are open.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use libublk::ctrl::UblkCtrl;
use testkit::wait::{PATIENCE, wait_for};
use ublkup::door::ublk::{DoorEnd, UblkDoor, UblkError};
use ublkup::storage::{Memory, Null};

use super::{config, is_gone, limits, no_end, serve, with_id};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_device_stopped_by_somebody_else_is_removed_and_reported() {
    for delete in [false, true] {
        let (sender, ends) = channel();
        let report = move |end| sender.send(end).unwrap();
        let backend = Arc::new(Null::new(limits()));
        let door = UblkDoor::start(&config(), &backend, Arc::default, report).unwrap();
        let id = door.id();
        // A peer that is not ours.
        let other = UblkCtrl::new_simple(i32::try_from(id).unwrap()).unwrap();
        if delete {
            other.del_dev().unwrap();
        } else {
            other.kill_dev().unwrap();
        }
        let end = ends.recv_timeout(Duration::from_secs(20)).unwrap();
        assert!(matches!(end, DoorEnd::Outside), "{end:?}");
        assert!(is_gone(id));
        door.stop().unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn stopping_under_load_is_quick_and_clean() {
    let door = serve(Memory::new(limits()).unwrap());
    let of = format!("of={}", door.block_path().display());
    let mut load: Vec<_> = (0..4)
        .map(|_| {
            Command::new("dd")
                .args(["if=/dev/zero", &of, "bs=4k", "oflag=direct"])
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    std::thread::sleep(Duration::from_millis(200));
    let (id, begin) = (door.id(), Instant::now());
    door.stop().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(is_gone(id));
    for dd in &mut load {
        dd.wait().unwrap();
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_that_somebody_has_open_is_taken_away_and_its_id_comes_back_later() {
    let door = serve(Null::new(limits()));
    let (id, begin) = (door.id(), Instant::now());
    let hold = format!(
        "exec 9<{} && echo held && exec cat",
        door.block_path().display()
    );
    let mut holder = Command::new("sh")
        .args(["-c", &hold])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(holder.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    door.stop().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10));
    assert!(is_gone(id));
    let again = || {
        let same = with_id(id);
        UblkDoor::start(&same, &Arc::new(Null::new(limits())), Arc::default, no_end)
    };
    assert!(matches!(again(), Err(UblkError::IdInUse { .. })));
    // The end of its input ends the holder.
    drop(holder.stdin.take());
    holder.wait().unwrap();
    let door = wait_for("the id is free", PATIENCE, || Ok(again().ok()));
    door.unwrap().stop().unwrap();
}
