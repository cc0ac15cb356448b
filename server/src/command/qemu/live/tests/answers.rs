//! Answers that belong to other commands, or do not come.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;

/// What QEMU has of that disk then.
fn given_old() -> Given {
    let monitor = Monitor::start(vec![("query-fdsets", vec![sets(&old())])]);
    let mut qmp = monitor.connect();
    let found = given(&mut qmp).unwrap().remove(0);
    monitor.heard(qmp);
    found
}

#[test]
fn the_answer_to_another_command_is_none_to_this_one() {
    for late in [
        json!({ "return": [{ "label": "late" }], "id": 0 }),
        json!({ "error": { "desc": "late" }, "id": 0 }),
        json!({ "return": [{ "label": "late" }], "id": null }),
    ] {
        let answers = vec![late, returns(json!([]))];
        let monitor = Monitor::start(vec![("query-chardev", answers)]);
        let mut qmp = monitor.connect();
        assert!(!has_chardev(&mut qmp, &old()).unwrap());
        monitor.heard(qmp);
    }
}

#[test]
fn an_answer_that_does_not_come_in_time_is_no_refusal() {
    let monitor = Monitor::start(vec![("device_del", vec![])]);
    let mut qmp = monitor.connect();
    qmp.answer_limit = Duration::ZERO;
    let error = exchange_old(&mut qmp, &Interrupted::default(), || unreachable!()).unwrap_err();
    assert!(error.is::<Unanswered>(), "{error:#}");
    monitor.heard(qmp);
}

#[test]
fn events_that_nobody_waits_for_are_not_kept() {
    let flood = (0..1000).map(|number| event("DEVICE_DELETED", &number.to_string()));
    let answers = flood.chain([ok()]).collect();
    let monitor = Monitor::start(vec![("device_del", answers), ("cont", vec![ok()])]);
    let mut qmp = monitor.connect();
    qmp.unplug("disk").unwrap();
    qmp.command("cont", json!({})).unwrap();
    let kept = format!("{qmp:?}");
    assert!(!kept.contains("DEVICE_DELETED"), "{kept}");
    monitor.heard(qmp);
}

#[test]
fn what_is_not_answered_is_not_undone() {
    let released = ("device_del", vec![ok(), event("DEVICE_DELETED", "disk")]);
    let none = vec![returns(json!([]))];
    // Each script is the whole: the monitor hears nothing after what it does not answer.
    let forth = [
        released.clone(),
        ("blockdev-del", vec![ok()]),
        ("query-chardev", none.clone()),
        ("chardev-add", vec![ok()]),
        ("device_add", vec![]),
    ];
    let undone = [
        &forth[..4],
        &[
            ("device_add", vec![no("no slot")]),
            ("chardev-remove", vec![ok()]),
            ("query-named-block-nodes", none),
            ("blockdev-add", vec![ok()]),
            ("device_add", vec![]),
        ],
    ]
    .concat();
    // The events are not told either.
    let mute = vec![("device_del", vec![ok(), Value::Null])];
    let scripts = (1..=forth.len()).map(|steps| forth[..steps].to_vec());
    let later = (forth.len() + 2..=undone.len()).map(|steps| undone[..steps].to_vec());
    for mut script in scripts.chain(later).chain([mute]) {
        let (last, answers) = script.last_mut().unwrap();
        if *last != "device_del" || answers.last() != Some(&Value::Null) {
            *answers = vec![Value::Null];
        }
        let steps = script.len();
        let monitor = Monitor::start(script);
        let mut qmp = monitor.connect();
        let error = exchange_old(&mut qmp, &Interrupted::default(), || Ok(())).unwrap_err();
        let error = give_up(&mut qmp, &given_old(), Path::new("/dev/ublkb0"), error);
        let said = format!("{error:#}");
        assert!(said.starts_with("it is unknown how"), "{steps}: {said}");
        assert!(said.contains("--back") && !said.contains("without the disk"));
        assert_eq!(monitor.heard(qmp).len(), steps);
    }
}

#[test]
fn the_claim_ends_when_the_guest_is_known_to_have_the_block_device() {
    let monitor = Monitor::start(vec![("remove-fd", vec![ok()])]);
    let mut qmp = monitor.connect();
    let error = give_up(
        &mut qmp,
        &given_old(),
        Path::new("/dev/ublkb0"),
        anyhow!("not moved"),
    );
    assert_eq!(format!("{error:#}"), "not moved");
    assert_eq!(monitor.heard(qmp)[0], json!({ "fdset-id": 2 }));
}

#[test]
fn a_disk_without_an_id_that_was_not_unplugged_is_not_plugged_in_twice() {
    let old = Disk {
        device: "/machine/peripheral-anon/device[3]".into(),
        ..old()
    };
    let monitor = Monitor::start(vec![
        ("qom-get", vec![no("Device 'ublkup-live' not found")]),
        ("qom-get", vec![returns(json!("virtio-blk-pci"))]),
    ]);
    let mut qmp = monitor.connect();
    assert_eq!(plugged_now(&mut qmp, &old).unwrap(), Plugged::Block);
    let heard = monitor.heard(qmp);
    assert_eq!(heard[0]["path"], "/machine/peripheral/ublkup-live");
    assert_eq!(heard[1]["path"], old.device.as_str());
}
