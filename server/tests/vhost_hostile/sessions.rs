//! Clients that send messages and descriptors that make no sense: their session ends.

use std::io::Write;
use std::os::fd::AsRawFd;

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use super::common::*;
use super::{Pair, READ_ONLY};

#[test]
fn messages_that_make_no_sense_end_the_session_and_nothing_else() {
    let mut pair = Pair::new();
    type Attack = (&'static str, fn(&mut Driver) -> bool);
    let attacks: [Attack; 12] = [
        ("features not offered", |d| {
            d.frontend.set_features(1 << 27).is_err()
        }),
        ("a vring too many", |d| {
            d.frontend.set_vring_base(256, 0).is_err()
        }),
        ("features while running", |d| {
            d.frontend.set_features(PROTOCOL).is_err()
        }),
        ("a size while running", |d| {
            d.frontend.set_vring_num(0, 64).is_err()
        }),
        ("a size of no power of two", |d| {
            d.frontend.set_vring_num(1, 100).is_err()
        }),
        ("a regular file as kick", |d| {
            let file = std::fs::File::open("/proc/self/exe").unwrap();
            signal(d, file.as_raw_fd())
        }),
        ("a memory file as kick", |d| {
            let file = d.memory.file.as_raw_fd();
            signal(d, file)
        }),
        ("memory that overlaps", |d| {
            d.frontend
                .set_mem_table(&[d.memory.region(), d.memory.part(4096, 4096)])
                .is_err()
        }),
        ("memory beyond its file", |d| {
            let mut region = d.memory.part(0, MEMORY_BYTES);
            region.mmap_offset = 4096;
            d.frontend.set_mem_table(&[region]).is_err()
        }),
        ("memory in a file that cannot be written", |d| {
            let file = std::fs::File::open("/proc/self/exe").unwrap();
            let mut region = d.memory.part(0, 4096);
            region.mmap_handle = file.as_raw_fd();
            d.frontend.set_mem_table(&[region]).is_err()
        }),
        ("a ring outside memory", |d| {
            ring_at(d, USER_BASE + MEMORY_BYTES - 64)
        }),
        ("a ring at no address", |d| ring_at(d, u64::MAX - 15)),
    ];
    for (what, attack) in attacks {
        let mut bad = pair.bad();
        assert!(attack(&mut bad), "{what} was taken");
        eventually(&format!("{what} ends the session"), || {
            pair.fixture.door.sessions().len() == 1
        });
        pair.check_good();
    }
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[1, 0, 0, 0, 1],
    ] {
        let mut stream = pair.fixture.connect();
        stream.write_all(garbage).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        eventually("the session ends", || {
            pair.fixture.door.sessions().len() == 1
        });
        pair.check_good();
    }
}

/// Gives a descriptor as the kick of vring 1.
fn signal(driver: &mut Driver, fd: i32) -> bool {
    // SAFETY: a duplicate is ours to own.
    let fd = unsafe { <EventFd as std::os::fd::FromRawFd>::from_raw_fd(libc::dup(fd)) };
    driver.frontend.set_vring_kick(1, &fd).is_err()
}

/// Sets up vring 1 with its descriptor table at a bad address.
fn ring_at(driver: &mut Driver, address: u64) -> bool {
    let frontend: &mut Frontend = &mut driver.frontend;
    let addresses = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: address,
        used_ring_addr: USER_BASE + 0x1_a000,
        avail_ring_addr: USER_BASE + 0x1_8000,
        log_addr: None,
    };
    frontend.set_vring_num(1, 64).unwrap();
    frontend.set_vring_addr(1, &addresses).unwrap();
    let kick = EventFd::new(0).unwrap();
    frontend.set_vring_kick(1, &kick).unwrap();
    frontend.set_vring_enable(1, true).is_err()
}

#[test]
fn a_kick_pipe_whose_writer_is_gone_ends_the_session_instead_of_spinning() {
    let mut pair = Pair::new();
    let mut bad = Driver::connect(pair.fixture.connect(), READ_ONLY);
    let (reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the descriptor is handed over.
    let kick = unsafe {
        <EventFd as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(
            reader,
        ))
    };
    let vring = Vring::new(0, 64);
    let addresses = VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: USER_BASE,
        used_ring_addr: USER_BASE + vring.used,
        avail_ring_addr: USER_BASE + vring.available,
        log_addr: None,
    };
    bad.frontend.set_vring_num(0, 64).unwrap();
    bad.frontend.set_vring_addr(0, &addresses).unwrap();
    bad.frontend.set_vring_kick(0, &kick).unwrap();
    bad.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(pair.fixture.door.sessions().len(), 2);
    drop(writer);
    eventually("the session ends", || {
        pair.fixture.door.sessions().len() == 1
    });
    pair.check_good();
}
