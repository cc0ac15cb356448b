//! Block devices of more than 16 TiB.

use ublkup::request::MAX_DISK_BYTES;

use super::common::sandbox;
use super::data::serve;
use super::run;
use super::upgrade::{BLOCK, direct, errno, read_block, write_block};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_block_device_is_as_large_as_a_disk_can_be() {
    let lab = sandbox();
    let image = lab.path("disk.img");
    let file = std::fs::File::create(&image).unwrap();
    let len_bytes = [MAX_DISK_BYTES, 64 << 40]
        .into_iter()
        .find(|size| file.set_len(*size).is_ok())
        .expect("a file system for files of more than 16 TiB (tmpfs)");
    for (spec, len_bytes, stores) in [
        (format!("null:{MAX_DISK_BYTES}"), MAX_DISK_BYTES, false),
        (format!("file:{}", image.display()), len_bytes, true),
    ] {
        let (server, device) = serve(&lab, "d", &spec, &[]);
        let path = device.to_str().unwrap();
        let size = run("blockdev", &["--getsize64", path]).unwrap();
        assert_eq!(size, len_bytes.to_string(), "{spec}");
        let held = direct(&device);
        let last = len_bytes / BLOCK as u64 - 1;
        write_block(&held, last, b'z').unwrap();
        write_block(&held, 0, b'a').unwrap();
        if stores {
            for (number, byte) in [(last, b'z'), (last - 1, 0), (0, b'a')] {
                assert!(
                    read_block(&held, number).0.iter().all(|&b| b == byte),
                    "{number}"
                );
            }
        }
        drop(held);
        let offset = (len_bytes - (1 << 30)).to_string();
        run("blkdiscard", &["-f", "-o", &offset, path]).unwrap();
        let held = direct(&device);
        if stores {
            assert!(read_block(&held, last).0.iter().all(|&b| b == 0));
        }
        if len_bytes < MAX_DISK_BYTES {
            assert_eq!(
                errno(write_block(&held, last + 1, b'x')),
                Some(libc::ENOSPC)
            );
        }
        drop(held);
        server.stop().unwrap();
    }
    lab.is_clean();
}
