//! A client that came by the block device's descriptor gets its disk back, and no other does.

use std::fs::File;
use std::os::unix::net::UnixStream;

use upgrade_proto::{Answer, Lookup, Route, connect};
use vhost::VhostBackend;

use super::common::{OK, eventually};
use super::recorded::Client;
use super::recovery::Disk;
use super::upgrade::{BLOCK, PLAIN, direct, errno, read_block, service, stat, write_block};

const FEATURES: u64 = PLAIN | super::common::FLUSH;

fn come(disk: &Disk, held: &File, route: Route) -> UnixStream {
    let lookup = Lookup {
        kernel: route == Route::Kernel,
        runtime_dirs: match route {
            Route::Kernel => Vec::new(),
            Route::Registry => vec![disk.lab.path("run")],
        },
        ..Lookup::default()
    };
    match connect(held, &service(), &lookup).unwrap() {
        Answer::Found(found) => found.into_stream(),
        Answer::NoService(why) => panic!("no service by {route:?}: {why}"),
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_impostor_does_not_get_the_disk_by_its_descriptor() {
    for route in [Route::Kernel, Route::Registry] {
        for way in ["client", "serve", "take-over"] {
            let disk = Disk::new();
            let args = ["--reconnect-grace", "3600"];
            let mut server = disk.serve(&args);
            let held = direct(&disk.device());
            let mut owner = Client::connect(come(&disk, &held, route), FEATURES);
            assert!(owner.start());
            assert_eq!(owner.driver.write(0, &[b'a'; BLOCK]), OK);
            match way {
                "serve" => {
                    server.kill().unwrap();
                    server = disk.serve(&args);
                }
                "take-over" => {
                    let next = disk.serve(&[&args[..], &["--take-over"]].concat());
                    assert_eq!(server.exit_code().unwrap(), Some(0));
                    server = next;
                }
                _ => {}
            }
            let mut owner = owner.reconnect(|| come(&disk, &held, route));
            eventually("the disk is kept", || disk.access() == "waiting");
            let mut impostor = Client::connect(come(&disk, &held, route), FEATURES);
            assert!(!impostor.start(), "by {route:?} after {way}");
            let kept_for = stat(&disk.lab)["kept_for"]["client"].clone();
            let said = format!("the disk is kept for {} for ", kept_for.as_str().unwrap());
            eventually("the log says for whom", || server.log().contains(&said));
            assert_eq!(errno(write_block(&held, 0, b'x')), Some(libc::EBADE));
            assert!(owner.start(), "by {route:?} after {way}");
            assert_eq!(owner.driver.read(0, BLOCK), (OK, vec![b'a'; BLOCK]));
            owner.driver.frontend.get_vring_base(0).unwrap();
            drop(owner);
            eventually("it leaves", || disk.access() == "block");
            write_block(&held, 0, b'b').unwrap();
            assert!(read_block(&held, 0).0.iter().all(|&byte| byte == b'b'));
            drop(held);
            server.stop().unwrap();
            disk.lab.is_clean();
        }
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn no_descriptor_of_a_server_is_inherited_by_what_it_might_start() {
    let disk = Disk::new();
    let server = disk.serve(&[]);
    let held = direct(&disk.device());
    let mut client = Client::connect(come(&disk, &held, Route::Kernel), FEATURES);
    assert!(client.start());
    super::common::expect_all_close_on_exec(server.pid());
    client.driver.frontend.get_vring_base(0).unwrap();
    drop((client, held));
    server.stop().unwrap();
}
