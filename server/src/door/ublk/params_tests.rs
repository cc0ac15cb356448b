//! What disks look like to the block layer.

use super::*;
use crate::request::small_disk;

const PAGE: u32 = 4096;

fn of(limits: &Limits) -> sys::ublk_params {
    params(limits, buffer_bytes(limits, PAGE), PAGE).unwrap()
}

#[test]
fn data_lies_as_was_asked_or_as_the_driver_has_it() {
    let known = of(&small_disk(1 << 30));
    for (asked, has) in [
        (None, 4),
        (Some(1), 4),
        (Some(512), 512),
        (Some(4096), 4096),
    ] {
        assert_eq!(
            Params::new(known, asked).alignment_bytes(),
            has,
            "{asked:?}"
        );
    }
}

#[test]
fn a_device_tells_the_limits_that_it_was_made_with() {
    let mut disk = small_disk(1 << 30);
    disk.optimal_io_bytes = 1 << 16;
    for write_cache in [true, false] {
        for read_only in [true, false] {
            disk.write_cache = write_cache;
            disk.read_only = read_only;
            disk.serial = Serial::default();
            assert_eq!(limits(&of(&disk)), disk);
        }
    }
    disk.max_discard_bytes = 0;
    disk.max_write_zeroes_bytes = 0;
    disk.optimal_io_bytes = 0;
    let told = limits(&of(&disk));
    assert_eq!(
        (told.max_discard_bytes, told.max_write_zeroes_bytes),
        (0, 0)
    );
    assert_eq!(told.optimal_io_bytes, 0);
}

#[test]
fn an_ordinary_disk_is_described_as_it_is() {
    let mut disk = small_disk(1 << 30);
    disk.optimal_io_bytes = 1 << 16;
    let got = of(&disk);
    assert_eq!(got.basic.dev_sectors, 1 << 21);
    assert_eq!(got.basic.logical_bs_shift, 9);
    assert_eq!(got.basic.physical_bs_shift, 12);
    assert_eq!(got.basic.io_min_shift, 12);
    assert_eq!(got.basic.io_opt_shift, 16);
    assert_eq!(got.basic.max_sectors, 2048);
    let cache = sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA;
    assert_eq!(got.basic.attrs, cache);
    assert_eq!(got.discard.discard_granularity, 4096);
    assert_eq!(got.discard.max_discard_sectors, 1 << 21);
    assert_eq!(got.discard.max_write_zeroes_sectors, 1 << 21);
    assert_eq!(got.discard.max_discard_segments, 1);
}

#[test]
fn read_only_and_cache_are_attributes_of_their_own() {
    let mut disk = small_disk(1 << 20);
    disk.read_only = true;
    disk.write_cache = false;
    assert_eq!(of(&disk).basic.attrs, sys::UBLK_ATTR_READ_ONLY);
}

#[test]
fn what_32_bits_of_sectors_cannot_hold_is_cut_to_whole_blocks() {
    let mut disk = small_disk(1 << 44);
    disk.block_bytes = 4096;
    disk.max_discard_bytes = u64::MAX;
    disk.max_write_zeroes_bytes = (1 << 20) + 512;
    let got = of(&disk);
    assert_eq!(got.basic.dev_sectors, 1 << 35);
    assert_eq!(got.discard.max_discard_sectors, u32::MAX - 7);
    assert_eq!(got.discard.max_write_zeroes_sectors, 2048);
}

#[test]
fn a_disk_without_discard_says_nothing_about_it() {
    let mut disk = small_disk(1 << 20);
    disk.max_discard_bytes = 0;
    let got = of(&disk);
    assert_ne!(got.types & sys::UBLK_PARAM_TYPE_DISCARD, 0);
    assert_eq!(got.discard.max_discard_sectors, 0);
    disk.max_write_zeroes_bytes = 0;
    assert_eq!(of(&disk).types & sys::UBLK_PARAM_TYPE_DISCARD, 0);
}

#[test]
fn buffers_are_whole_pages_within_what_the_driver_takes() {
    let mut disk = small_disk(1 << 20);
    for (max_io, buffer) in [
        (512, 4096),
        (4096, 4096),
        (10_000, 8192),
        (1 << 20, 1 << 20),
        (u32::MAX, 32 << 20),
    ] {
        disk.max_io_bytes = max_io;
        assert_eq!(buffer_bytes(&disk, PAGE), buffer);
        assert_eq!(of(&disk).basic.max_sectors, buffer / 512);
    }
}

#[test]
fn queues_and_depths_that_the_driver_refuses_are_named() {
    assert!(check_queues(1, 4096).is_ok());
    for (queues, depth, word) in [
        (0, 1, "0 queues"),
        (4097, 1, "4097 queues"),
        (1, 0, "0 requests"),
        (1, 4097, "4097 requests"),
    ] {
        let text = check_queues(queues, depth).unwrap_err().to_string();
        assert!(text.contains(word) && text.contains("4096"), "{text}");
    }
}

#[test]
fn sizes_that_the_driver_cannot_express_are_refused_or_no_hint() {
    let mut disk = small_disk(1 << 20);
    disk.optimal_io_bytes = 3 << 19;
    assert_eq!(of(&disk).basic.io_opt_shift, 0);
    disk.block_bytes = 8192;
    let error = params(&disk, 1 << 20, PAGE).unwrap_err().to_string();
    assert!(error.contains("8192 bytes"), "{error}");
}
