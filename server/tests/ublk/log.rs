//! Servers of a block device whose log cannot be written.

use rustix::process::Signal;

use super::logs::{BAD_LOGS, end_by, ended, serve};
use super::recovery::Disk;
use super::upgrade::{direct, read_block, write_block};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_log_that_cannot_be_written_keeps_no_block_device_from_its_next_server_or_its_end() {
    for (kind, log) in BAD_LOGS {
        println!("a log: {kind}");
        let disk = Disk::new();
        let spec = format!("file:{}", disk.image.display());
        let args = ["serve", "--ublk", "yes", "--name", "d", &spec];
        let (errors, _reader) = log();
        let first = serve(&disk.lab, &args, errors);
        let device = disk.device();
        let held = direct(&device);
        write_block(&held, 1, b'1').unwrap();
        let (errors, _reader) = log();
        let take_over = [&args[..], &["--take-over"]].concat();
        let second = serve(&disk.lab, &take_over, errors);
        assert_eq!(ended(first), Some(0));
        write_block(&held, 2, b'2').unwrap();
        assert_eq!(end_by(second, Signal::KILL), None);
        let (errors, _reader) = log();
        let third = serve(&disk.lab, &["recover", "d"], errors);
        assert_eq!(disk.device(), device);
        write_block(&held, 3, b'3').unwrap();
        for (number, byte) in [(1, b'1'), (2, b'2'), (3, b'3')] {
            assert!(read_block(&held, number).0.iter().all(|&b| b == byte));
        }
        drop(held);
        assert_eq!(end_by(third, Signal::TERM), Some(0));
        assert!(!device.exists(), "it stayed behind");
        disk.lab.is_clean();
    }
}
