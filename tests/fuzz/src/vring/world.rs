//! What inputs have in common, made once by each thread: guest memory, a ring, a log of dirty pages, a record.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use ublkup::door::vhost::testing::{GuestMemory, GuestRegion, PageLog, Queues, Record};
use ublkup::io::Ring;
use ublkup::request::Limits;

use super::DISK_BYTES;
use super::driver::MAX_QUEUE;

/// Where the parts of the vring are in the file.
pub(super) const DESCRIPTORS: u64 = 0;
pub(super) const AVAILABLE: u64 = 0x400;
pub(super) const USED: u64 = 0x600;
/// What is behind the vring: headers, status bytes, indirect tables, data.
pub(super) const BUFFERS: u64 = 0x1000;

/// The first region is the file's first pages. The second one is the next in the guest's view, and in the file it begins and
/// ends within a page: what is mapped beside it must not change.
const FIRST_BYTES: u64 = 0x4000;
const SECOND_BYTES: u64 = 0x1000;
const SECOND_AT: u64 = 0x4800;
const FILE_BYTES: usize = 0x6000;

const GUEST: u64 = 0x1_0000;
const USER: u64 = 0x7f00_0000_0000;
const SECOND_USER: u64 = 0x7e00_0000_0000;

/// Bytes of the guest's memory, whose regions are adjacent in its view.
pub(super) const MEMORY_BYTES: u64 = FIRST_BYTES + SECOND_BYTES;

/// Bytes of the log of dirty pages: more than one bit for each page.
pub(super) const LOG_BYTES: u64 = 64;

/// What is beside the second region.
const BESIDE: u8 = 0xcb;

/// The guest's address of an offset in its memory.
pub(super) fn guest(offset: u64) -> u64 {
    GUEST.wrapping_add(offset)
}

/// The client's address of an offset in the first region.
pub(super) fn user(offset: u64) -> u64 {
    USER + offset
}

pub(super) struct World {
    /// A handle of its own for what runs at accesses.
    pub(super) file: Rc<File>,
    /// All memory; all but the second region; the same with the second one elsewhere; all but the first.
    pub(super) maps: [GuestMemory; 4],
    /// One that marks requests, one that does not.
    pub(super) logs: [PageLog; 2],
    pub(super) record: Record,
    record_file: File,
    pub(super) limits: Limits,
}

thread_local! {
    static WORLD: RefCell<Option<(World, Ring)>> = const { RefCell::new(None) };
}

fn len(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the memory is small")
}

fn memory_file(name: &str, len_bytes: u64) -> File {
    let file = memfd_create(name, MemfdFlags::CLOEXEC).expect("memory");
    ftruncate(&file, len_bytes).expect("memory");
    file.into()
}

impl World {
    fn new() -> Self {
        let file = memory_file("guest", FILE_BYTES as u64);
        let first = GuestRegion {
            file: &file,
            offset_bytes: 0,
            guest: GUEST,
            user: USER,
            len_bytes: FIRST_BYTES,
        };
        let second = GuestRegion {
            offset_bytes: SECOND_AT,
            guest: GUEST + FIRST_BYTES,
            user: SECOND_USER,
            len_bytes: SECOND_BYTES,
            ..first
        };
        let elsewhere = GuestRegion {
            guest: GUEST + 0x10_0000,
            ..second
        };
        let map = |regions: &[_]| GuestMemory::map(regions).expect("mapped");
        let maps = [
            map(&[first, second]),
            map(&[first]),
            map(&[first, elsewhere]),
            map(&[second]),
        ];
        let log = memory_file("log", LOG_BYTES);
        let logs = [true, false].map(|all| PageLog::map(&log, LOG_BYTES, all).expect("mapped"));
        let (record, record_file) = Record::create(1, MAX_QUEUE).expect("a record");
        let limits = crate::limits(DISK_BYTES);
        Self {
            file: Rc::new(file),
            maps,
            logs,
            record,
            record_file,
            limits,
        }
    }

    /// As it is for each input: memory of zeroes, and a record of nothing.
    fn clear(&self) {
        let mut bytes = [0; FILE_BYTES];
        for beside in Self::beside() {
            bytes[beside].fill(BESIDE);
        }
        self.file.write_all_at(&bytes, 0).expect("written");
        let zeroes = [0; 16 + 16 * MAX_QUEUE as usize];
        self.record_file.write_all_at(&zeroes, 0).expect("written");
    }

    fn beside() -> [std::ops::Range<usize>; 2] {
        [0x4000..0x4800, 0x5800..FILE_BYTES]
    }

    /// What must be so after each input.
    pub(super) fn check(&self) {
        let mut bytes = [0; FILE_BYTES];
        self.file.read_exact_at(&mut bytes, 0).expect("read");
        for beside in Self::beside() {
            assert!(
                bytes[beside] == [BESIDE; 0x800],
                "memory beside a region was written to"
            );
        }
    }

    /// Writes to the guest's memory, as far as there is any.
    pub(super) fn put(file: &File, offset: u64, bytes: &[u8]) {
        let write = |bytes: &[u8], at| file.write_all_at(bytes, at).expect("written");
        let (first, second) = match FIRST_BYTES.checked_sub(offset) {
            Some(left) => bytes.split_at(bytes.len().min(len(left))),
            None => (&[][..], bytes),
        };
        write(first, offset);
        let behind = (offset + first.len() as u64).saturating_sub(FIRST_BYTES);
        let room = len(SECOND_BYTES.saturating_sub(behind));
        write(&second[..second.len().min(room)], SECOND_AT + behind);
    }

    /// Lends this thread's to `run`.
    pub(super) fn with(run: impl FnOnce(&Self, &mut Ring)) {
        WORLD.with_borrow_mut(|world| {
            let make = || (Self::new(), Queues::ring().expect("a ring"));
            let (world, ring) = world.get_or_insert_with(make);
            world.clear();
            run(world, ring);
        });
    }
}
