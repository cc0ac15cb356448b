//! Messages in pieces, in halves, with descriptors that do not fit, and about the log.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use testkit::vhost::raw::{FrontendReq, NEED_REPLY, answer, is_closed, message, send};
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::EventFd;

const GET_FEATURES: u32 = FrontendReq::GET_FEATURES as u32;
const SET_LOG_FD: u32 = FrontendReq::SET_LOG_FD as u32;
const SET_VRING_CALL: u32 = FrontendReq::SET_VRING_CALL as u32;
const SET_STATUS: u32 = FrontendReq::SET_STATUS as u32;

fn fixture() -> Fixture {
    Fixture::new(MemoryDisk::new(limits(1 << 20)).unwrap(), 1)
}

/// A driver, and its connection for messages that its crate does not send.
fn running(fixture: &Fixture) -> (Driver, UnixStream) {
    let stream = fixture.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let raw = stream.try_clone().unwrap();
    (Driver::running(stream, USUAL), raw)
}

#[test]
fn messages_may_come_in_pieces() {
    let fixture = fixture();
    let (mut driver, mut raw) = running(&fixture);
    let features = message(GET_FEATURES, 0, &[]);
    let status = message(SET_STATUS, NEED_REPLY, &7u64.to_ne_bytes());
    for (message, request) in [(features, GET_FEATURES), (status, SET_STATUS)] {
        for piece in message.chunks(3) {
            raw.write_all(piece).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        let value = answer(&raw, request).unwrap();
        let offered = value & VERSION_1 != 0;
        assert!(offered || (request, value) == (SET_STATUS, 0), "{value:#x}");
    }
    // With a descriptor, which comes with the first byte.
    let call = EventFd::new(0).unwrap();
    // SAFETY: the descriptor stays open during the borrow.
    let descriptor = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    for (first, others) in [(12, 5), (5, 15), (1, 19)] {
        let whole = message(SET_VRING_CALL, NEED_REPLY, &0u64.to_ne_bytes());
        send(&raw, &whole[..first], &[descriptor]).unwrap();
        for piece in whole[first..].chunks(others) {
            std::thread::sleep(Duration::from_millis(5));
            raw.write_all(piece).unwrap();
        }
        assert_eq!(answer(&raw, SET_VRING_CALL).unwrap(), 0);
    }
    driver.prepare(T_FLUSH, 0, &[]);
    assert!(readable(&call, PATIENCE), "the descriptor has arrived");
}

/// Else it would keep the disk from all others.
#[test]
fn a_client_that_sends_half_a_message_and_stays_loses_its_session_and_the_disk() {
    let whole = message(SET_STATUS, NEED_REPLY, &7u64.to_ne_bytes());
    let with_descriptor = message(SET_VRING_CALL, NEED_REPLY, &0u64.to_ne_bytes());
    let call = EventFd::new(0).unwrap();
    // SAFETY: the descriptor stays open during the borrow.
    let descriptor = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    type Case<'a> = (&'a [u8], &'a [BorrowedFd<'a>]);
    let halves: [Case; 6] = [
        (&whole[..1], &[]),
        (&whole[..11], &[]),
        (&whole[..13], &[]),
        (&whole[..19], &[]),
        (&with_descriptor[..4], &[descriptor]),
        (&with_descriptor[..12], &[descriptor]),
    ];
    let clients: Vec<_> = (halves.iter())
        .map(|(half, descriptors)| {
            let fixture = fixture();
            let (mut driver, raw) = running(&fixture);
            assert_eq!(driver.write(0, &[7; 512]), OK);
            send(&raw, half, descriptors).unwrap();
            // Its requests go on meanwhile.
            assert_eq!(driver.read(0, 512), (OK, vec![7; 512]));
            (fixture, driver, raw)
        })
        .collect();
    for ((fixture, _driver, raw), (half, _)) in clients.into_iter().zip(halves) {
        assert!(is_closed(&raw), "{half:?}");
        fixture.wait_empty();
        let mut next = Driver::running(fixture.connect(), USUAL);
        assert_eq!(next.read(0, 512), (OK, vec![7; 512]));
    }
}

#[test]
fn a_client_that_says_nothing_may_stay() {
    let fixture = fixture();
    let mut silent = fixture.connect();
    std::thread::sleep(Duration::from_secs(7));
    assert_eq!(fixture.door.sessions().len(), 1);
    silent.write_all(&message(GET_FEATURES, 0, &[])).unwrap();
    assert_ne!(answer(&silent, GET_FEATURES).unwrap() & VERSION_1, 0);
}

#[test]
fn a_descriptor_for_news_of_the_log_is_taken_and_not_kept() {
    let fixture = fixture();
    let (mut driver, raw) = running(&fixture);
    let (reader, writer) = std::io::pipe().unwrap();
    driver.frontend.set_log_fd(writer.as_raw_fd()).unwrap();
    // No answer is asked for, so none comes: the next one is another's.
    send(&raw, &message(SET_LOG_FD, 0, &[]), &[writer.as_fd()]).unwrap();
    assert_eq!(driver.frontend.get_queue_num().unwrap(), 256);
    drop(writer);
    let limit = Timespec::try_from(PATIENCE).unwrap();
    let mut fds = [PollFd::new(&reader, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&limit)), Ok(1));
    assert_eq!(
        fds[0].revents(),
        PollFlags::HUP,
        "it is closed, and unwritten"
    );
    assert_eq!(driver.read(0, 512).0, OK);
}

#[test]
fn messages_about_the_log_that_make_no_sense_end_the_session() {
    let fixture = fixture();
    let event = EventFd::new(0).unwrap();
    // SAFETY: the descriptor stays open during the borrow.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    type Case<'a> = (&'a [BorrowedFd<'a>], u32, &'a [u8]);
    let odd: [Case; 5] = [
        (&[], 0, &[]),
        (&[event; 2], 0, &[]),
        (&[event; 4], 0, &[]),
        (&[event], 0, &[0; 8]),
        // An answer to no request.
        (&[event], 4, &[]),
    ];
    for (descriptors, flags, payload) in odd {
        let (driver, raw) = running(&fixture);
        send(&raw, &message(SET_LOG_FD, flags, payload), descriptors).unwrap();
        assert!(is_closed(&raw), "{} {payload:?}", descriptors.len());
        drop(driver);
        fixture.wait_empty();
    }
}

#[test]
fn a_client_whose_descriptors_do_not_fit_under_the_servers_limit_is_told_from_one_that_sent_none() {
    let sandbox = sandbox();
    let server = sandbox.serve(&["--name", "disk", "--ublk", "no", "mem:1M"]);
    let pid = Pid::from_raw(server.pid().try_into().unwrap());
    let open = || {
        let open = std::fs::read_dir(format!("/proc/{}/fd", server.pid()));
        open.unwrap().count() as u64
    };
    let client = sandbox.connect("disk");
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    send(&client, &message(GET_FEATURES, 0, &[]), &[]).unwrap();
    answer(&client, GET_FEATURES).unwrap();
    let limit = getrlimit(Resource::Nofile);
    let current = Some(open() + 2);
    let low = Rlimit { current, ..limit };
    prlimit(pid, Resource::Nofile, low).unwrap();
    let descriptors = [client.as_fd(); 8];
    send(&client, &message(SET_LOG_FD, 0, &[]), &descriptors).unwrap();
    assert!(is_closed(&client));
    prlimit(pid, Resource::Nofile, limit).unwrap();
    eventually("the log says why", || {
        server.log().contains("as many open as its limit allows")
    });
    server.stop().unwrap();
}
