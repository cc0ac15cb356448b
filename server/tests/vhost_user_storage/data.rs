//! What is written is read again, whatever the other server is like.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::common::*;
use crate::peer::{BLK_SIZE, Knobs, Mood, Peer, RO, SEG_MAX, SIZE_MAX};
use crate::{open, options, serve, stat};
use ublkup::engine::StorageControl;
use ublkup::storage::VhostUser;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at * 7 + seed * 31 + at / 512).to_le_bytes()[0])
        .collect()
}

fn peer(knobs: Knobs) -> (tempfile::TempDir, Peer) {
    let scratch = tempfile::tempdir().unwrap();
    let peer = Peer::start(&scratch.path().join("peer.sock"), knobs);
    (scratch, peer)
}

#[test]
fn data_gets_to_the_other_server_without_a_copy() {
    let (_scratch, peer) = peer(Knobs::default());
    let disk = open(peer.socket());
    let copies = disk.copies();
    let fixture = Fixture::new(disk, 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    for (seed, len) in [(1, 512), (2, 4096), (3, 65536), (4, 1 << 20)] {
        let bytes = pattern(seed, len);
        assert_eq!(driver.write(8 * seed as u64, &bytes), OK);
        assert_eq!(driver.read(8 * seed as u64, len), (OK, bytes.clone()));
        assert!(peer.knobs().data[4096 * seed..][..len] == bytes);
    }
    assert_eq!(driver.request(T_FLUSH, 0, &[]).0, OK);
    assert_eq!(peer.count(T_FLUSH), 1);
    assert_eq!(driver.segment(T_WRITE_ZEROES, 32, 4096, 1), OK);
    assert!(
        peer.knobs().data[32 * 512..][..4096 * 512]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert_eq!(peer.count(T_WRITE_ZEROES), 4, "in pieces of what it takes");
    assert_eq!(driver.segment(T_DISCARD, 0, 1024, 0), OK);
    assert_eq!(peer.count(T_DISCARD), 1);
    assert_eq!(driver.read(1 << 13, 512).0, IOERR, "behind the end");
    assert_eq!(copies.load(Ordering::Relaxed), 0);
}

#[test]
fn memory_that_the_other_server_has_not_is_copied() {
    // One that takes the table of regions as a whole takes eight: rings, copies, six of clients.
    let protocol = Knobs::default().protocol - Protocol::CONFIGURE_MEM_SLOTS;
    let (_scratch, peer) = peer(Knobs {
        protocol,
        ..Knobs::default()
    });
    let disk = open(peer.socket());
    let copies = disk.copies();
    let fixture = Fixture::new(disk, 1);
    let mut driver = Driver::connect(fixture.connect(), USUAL);
    const PART: u64 = MEMORY_BYTES / 8;
    let parts: Vec<_> = (0..8)
        .map(|part| driver.memory.part(PART * part, PART))
        .collect();
    use vhost::VhostBackend;
    driver.frontend.set_mem_table(&parts).unwrap();
    driver.add_vring(128);
    // In the sixth region, when the server has let go of the one of before.
    eventually("a request in the first six is not copied", || {
        let before = copies.load(Ordering::Relaxed);
        through(&mut driver, 5 * PART, &pattern(1, 256 << 10));
        copies.load(Ordering::Relaxed) == before
    });
    // In the last two.
    let before = copies.load(Ordering::Relaxed);
    let bytes = pattern(2, 256 << 10);
    through(&mut driver, 7 * PART - 4096, &bytes);
    assert!(peer.knobs().data[64 * 512..][..bytes.len()] == bytes);
    assert!(copies.load(Ordering::Relaxed) > before);
}

/// Writes what is at an address of the client's memory, and reads it to there.
fn through(driver: &mut Driver, at: u64, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).unwrap();
    driver.memory.put(at, bytes);
    for (kind, flags) in [(T_OUT, 0), (T_IN, WRITE)] {
        driver.header(DATA, kind, 64);
        let chain = [(DATA, 16, 0), (at, len, flags), (DATA + 16, 1, WRITE)];
        driver.submit_on(0, 0, &chain);
        driver.vrings[0].wait(&driver.memory);
        assert_eq!(driver.memory.byte(DATA + 16), OK);
        assert!(driver.memory.get(at, bytes.len()) == bytes);
        driver.memory.put(at, &vec![0; bytes.len()]);
    }
}

#[test]
fn servers_of_all_kinds_get_what_they_take() {
    let plain = Knobs::default().features;
    for knobs in [
        Knobs {
            features: plain & !INDIRECT,
            ..Knobs::default()
        },
        Knobs {
            features: plain & !SEG_MAX,
            seg_max: 1,
            ..Knobs::default()
        },
        Knobs {
            features: plain | SIZE_MAX,
            size_max: 4096,
            seg_max: 3,
            ..Knobs::default()
        },
        Knobs {
            features: plain | BLK_SIZE,
            block_bytes: 4096,
            seg_max: 2,
            ..Knobs::default()
        },
        Knobs {
            protocol: Protocol::CONFIG,
            mood: Mood::Backwards,
            queues: 1,
            ..Knobs::default()
        },
    ] {
        let (_scratch, peer) = peer(knobs);
        let fixture = Fixture::new(open(peer.socket()), 1);
        let mut driver = Driver::running(fixture.connect(), USUAL);
        let bytes = pattern(5, 96 << 10);
        driver.memory.put(DATA + 4096, &bytes);
        // Segments that do not end at blocks.
        let lens = [100, 412, 8192, 1024, 3072, 32768, 20000, 32736];
        for (kind, flags) in [(T_OUT, 0), (T_IN, WRITE)] {
            let data = lens.map(|len| (len, flags));
            assert_eq!(driver.request(kind, 16, &data).0, OK);
            let found = driver.memory.get(DATA + 4096, bytes.len());
            assert!(found == bytes);
            driver.memory.put(DATA + 4096, &vec![0; bytes.len()]);
        }
        assert!(peer.knobs().data[16 * 512..][..bytes.len()] == bytes);
    }
}

#[test]
fn many_requests_at_once_end_each_with_its_own_data() {
    let (_scratch, peer) = peer(Knobs {
        mood: Mood::Backwards,
        ..Knobs::default()
    });
    let fixture = Fixture::new(open(peer.socket()), 1);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    for round in 0..20 {
        for kind in [T_OUT, T_IN] {
            for block in 0..40u16 {
                let at = DATA + 0x2000 * u64::from(block);
                driver.header(at, kind, u64::from(block) * 8);
                let bytes = match kind {
                    T_OUT => pattern(round * 100 + usize::from(block), 4096),
                    _ => vec![0; 4096],
                };
                driver.memory.put(at + 4096, &bytes);
                let flags = if kind == T_IN { WRITE } else { 0 };
                let chain = [(at, 16, 0), (at + 4096, 4096, flags), (at + 16, 1, WRITE)];
                driver.submit_on(0, 3 * block, &chain);
            }
            let mut ended: Vec<_> = (0..40)
                .map(|_| driver.vrings[0].wait(&driver.memory).0)
                .collect();
            ended.sort_unstable();
            assert!(ended.into_iter().eq((0..40).map(|block| 3 * block)));
        }
        for block in 0..40 {
            let found = driver.memory.get(DATA + 0x2000 * block + 4096, 4096);
            assert!(found == pattern(round * 100 + usize::try_from(block).unwrap(), 4096));
        }
    }
}

#[test]
fn threads_that_share_a_virtqueue_get_each_its_own_answers() {
    for mood in [Mood::Serve, Mood::Backwards] {
        let (_scratch, peer) = peer(Knobs {
            queues: 1,
            mood,
            ..Knobs::default()
        });
        let fixture = Fixture::new(open(peer.socket()), 2);
        let mut driver = Driver::running(fixture.connect(), USUAL);
        driver.add_vring(128);
        for round in 0..300u16 {
            for (vring, block) in [(0, 0), (1, 1), (1, 2)] {
                let at = DATA + 0x2000 * block;
                driver.header(at, T_OUT, block * 8);
                driver
                    .memory
                    .put(at + 4096, &pattern(usize::from(round), 4096));
                let chain = [(at, 16, 0), (at + 4096, 4096, 0), (at + 16, 1, WRITE)];
                let first = 3 * u16::try_from(block).unwrap();
                driver.submit_on(vring, first, &chain);
            }
            assert_eq!(driver.vrings[0].wait(&driver.memory).0, 0);
            let mut both = [1, 1].map(|vring: usize| driver.vrings[vring].wait(&driver.memory).0);
            both.sort_unstable();
            assert_eq!(both, [3, 6]);
            if round % 50 == 0 {
                // Long enough for both to sleep.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        let found = &peer.knobs().data[..3 * 4096];
        assert!(found.chunks(4096).all(|block| block == pattern(299, 4096)));
    }
}

#[test]
fn without_a_write_back_cache_each_write_is_flushed() {
    let (_scratch, peer) = peer(Knobs::default());
    let fixture = Fixture::new(open(peer.socket()), 1);
    let features = USUAL & !(FLUSH | CONFIG_WCE);
    let mut driver = Driver::running(fixture.connect(), features);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    assert_eq!(driver.read(0, 512).0, OK);
    let log: Vec<_> = peer.knobs().log.iter().map(|done| done.0).collect();
    assert_eq!(log, [T_OUT, T_FLUSH, T_IN]);
}

#[test]
fn a_disk_that_cannot_be_written_is_served_read_only() {
    let lab = sandbox();
    let peer = Peer::start(
        &lab.path("peer.sock"),
        Knobs {
            features: Knobs::default().features | RO,
            ..Knobs::default()
        },
    );
    let server = serve(&lab, peer.socket());
    assert_eq!(stat(&lab)["read_only"], true);
    let mut driver = Driver::running(
        lab.connect("d"),
        USUAL & !(DISCARD | WRITE_ZEROES | CONFIG_WCE | FLUSH),
    );
    assert_eq!(driver.read(0, 512), (OK, vec![0; 512]));
    assert_eq!(driver.write(0, &[1; 512]), IOERR);
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn an_error_of_the_other_server_is_that_request_s() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    let server = serve(&lab, peer.socket());
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    peer.set_mood(Mood::Fail);
    assert_eq!(driver.write(0, &[1; 512]), IOERR);
    peer.set_mood(Mood::Serve);
    assert_eq!(driver.write(0, &[2; 512]), OK);
    let told = stat(&lab)["last_error"].as_str().unwrap().to_owned();
    assert!(
        told.contains("peer.sock") && told.contains("write of 512 bytes"),
        "{told}"
    );
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
fn what_cannot_be_served_is_refused_with_a_reason() {
    let lab = sandbox();
    let nowhere = format!("vhost-user:{}", lab.path("nowhere").display());
    lab.serve_fails(
        &[&nowhere],
        1,
        &["cannot connect to vhost-user:", "start the server first"],
    );
    for (name, knobs, why) in [
        (
            "config",
            Knobs {
                protocol: Protocol::MQ,
                ..Knobs::default()
            },
            "does not say how large its disk is",
        ),
        (
            "blocks",
            Knobs {
                features: Knobs::default().features | BLK_SIZE,
                block_bytes: 8192,
                ..Knobs::default()
            },
            "blocks of 8192 bytes",
        ),
        (
            "legacy",
            Knobs {
                features: Knobs::default().features & !VERSION_1,
                ..Knobs::default()
            },
            "virtio 1.0",
        ),
    ] {
        let peer = Peer::start(&lab.path(name), knobs);
        let Err(error) = VhostUser::open(&options(peer.socket())) else {
            panic!("{name} is served")
        };
        let text = error.to_string();
        assert!(text.contains(why) && text.contains(name), "{text}");
    }
}

#[test]
fn a_doctor_finds_the_other_server() {
    let lab = sandbox();
    let peer = Peer::start(&lab.path("peer.sock"), Knobs::default());
    assert_eq!(VhostUser::examine(peer.socket()).unwrap(), 4 << 20);
    let disk = Arc::new(open(peer.socket()));
    assert_eq!(disk.limits().capacity.bytes(), 4 << 20);
    assert_eq!(disk.identity(), Some(VhostUser::identity(peer.socket())));
}
