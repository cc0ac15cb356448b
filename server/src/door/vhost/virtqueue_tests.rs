use std::sync::Arc;

use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::chain::ChainError;
use super::notify::AVAIL_NO_INTERRUPT;
use super::*;
use crate::door::vhost::memory::tests::memfd;
use crate::door::vhost::memory::{Region, RegionAddress};
use crate::door::vhost::ring_layout::Descriptor;

const USER: u64 = 0x5000_0000;
const DESCRIPTORS: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SIZE: u16 = 8;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

/// A ring of 8 in a memory file, and the driver's view of it.
struct Bench {
    memory: &'static GuestMemoryMmap,
    available: AvailRing<'static, GuestMemoryMmap>,
    used: UsedRing<'static, GuestMemoryMmap>,
    map: HeldMap,
}

impl Bench {
    fn new() -> Self {
        let file = memfd(0x4000);
        let address = RegionAddress {
            guest: 0,
            len_bytes: 0x4000,
            user: USER,
        };
        let region = Region::map(address, &file, 0).unwrap();
        let range = (GuestAddress(0), 0x4000, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        // The driver's rings borrow it.
        let memory = &*Box::leak(Box::new(memory));
        Self {
            memory,
            available: AvailRing::new(memory, GuestAddress(AVAILABLE), SIZE),
            used: UsedRing::new(memory, GuestAddress(USED), SIZE),
            map: HeldMap::new(Arc::new(MemoryMap::new(vec![region]).unwrap())),
        }
    }

    fn queue(&self, event_index: bool, base: u16) -> Virtqueue {
        let options = RingOptions {
            size: SIZE,
            event_index,
            indirect: true,
        };
        Virtqueue::new(options, addresses(), base, self.map.map(), None).unwrap()
    }

    /// The driver makes `head` available at `index`, without telling.
    fn offer(&self, index: u16, head: u16) {
        let place = self.available.ring().ref_at((index % SIZE).into());
        place.unwrap().store(head.to_le());
    }

    fn set(&self, at: u64, value: u16) {
        let value = value.to_le();
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(at)).unwrap())
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        let table = DescriptorTable::new(self.memory, GuestAddress(table), SIZE);
        table.store(index, descriptor).unwrap();
    }

    fn walk(&self, queue: &Virtqueue, head: u16) -> Result<Vec<(u64, u32, bool)>, ChainError> {
        let step = |found: Result<Descriptor, _>| found.map(fields);
        queue.chain(head, &self.map).map(step).collect()
    }
}

fn fields(descriptor: Descriptor) -> (u64, u32, bool) {
    let writable = descriptor.is_write_only();
    (descriptor.addr().0, descriptor.len(), writable)
}

/// Polls and takes.
fn take(queue: &mut Virtqueue) -> Result<Option<u16>, RingError> {
    queue.poll()?;
    queue.pop()
}

fn addresses() -> RingAddresses {
    RingAddresses {
        descriptors: USER + DESCRIPTORS,
        available: USER + AVAILABLE,
        used: USER + USED,
    }
}

#[test]
fn chains_are_taken_in_order_and_across_the_wrap_of_the_index() {
    let bench = Bench::new();
    let mut queue = bench.queue(true, 65533);
    bench.available.idx().store(65533u16.to_le());
    assert_eq!(take(&mut queue), Ok(None));
    for (n, head) in [5u16, 1, 7, 0].into_iter().enumerate() {
        bench.offer(65533u16.wrapping_add(u16::try_from(n).unwrap()), head);
    }
    bench.available.idx().store(1u16.to_le());
    assert!(queue.has_unseen() && !queue.has_chains());
    assert_eq!(queue.pop(), Ok(None), "not polled");
    assert_eq!(queue.poll(), Ok(true));
    assert!(!queue.has_unseen() && queue.has_chains());
    let heads: Vec<_> = std::iter::from_fn(|| queue.pop().unwrap()).collect();
    assert_eq!(heads, [5, 1, 7, 0]);
    assert_eq!(queue.next_available(), 1);
}

#[test]
fn a_broken_available_ring_is_told_from_an_empty_one() {
    let bench = Bench::new();
    bench.available.idx().store(9u16.to_le());
    assert_eq!(
        take(&mut bench.queue(false, 0)),
        Err(RingError::AvailableIndex)
    );
    bench.available.idx().store(65535u16.to_le());
    assert_eq!(
        take(&mut bench.queue(false, 0)),
        Err(RingError::AvailableIndex)
    );
    bench.available.idx().store(8u16.to_le());
    bench.offer(0, 8);
    assert_eq!(take(&mut bench.queue(false, 0)), Err(RingError::Head));
    bench.offer(0, 7);
    assert_eq!(take(&mut bench.queue(false, 0)), Ok(Some(7)));
}

#[test]
fn rings_that_are_no_rings_are_refused() {
    let bench = Bench::new();
    let try_ring = |size, addresses| {
        let options = RingOptions {
            size,
            event_index: true,
            indirect: true,
        };
        Virtqueue::new(options, addresses, 0, bench.map.map(), None).err()
    };
    let good = addresses();
    assert_eq!(try_ring(8, good), None);
    assert_eq!(try_ring(0, good), Some(RingError::Size));
    assert_eq!(try_ring(7, good), Some(RingError::Size));
    for descriptors in [USER + 8, USER + 0x4000 - 16, USER - 16, 0, !15u64] {
        let bad = RingAddresses {
            descriptors,
            ..good
        };
        assert_eq!(
            try_ring(8, bad),
            Some(RingError::Address),
            "{descriptors:#x}"
        );
    }
    for available in [USER + 1, USER + 0x3ffe, u64::MAX - 1] {
        let bad = RingAddresses { available, ..good };
        assert_eq!(try_ring(8, bad), Some(RingError::Address), "{available:#x}");
    }
    for used in [USER + 2, USER + 0x3ffc, 0] {
        let bad = RingAddresses { used, ..good };
        assert_eq!(try_ring(8, bad), Some(RingError::Address), "{used:#x}");
    }
}

#[test]
fn chains_are_followed_through_the_ring_and_an_indirect_table() {
    let bench = Bench::new();
    let queue = bench.queue(false, 0);
    bench.descriptor(DESCRIPTORS, 3, 0x3000, 16, FLAG_NEXT, 6);
    bench.descriptor(DESCRIPTORS, 6, 0x3101, 32, FLAG_INDIRECT, 0);
    bench.descriptor(0x3101, 0, 0x3800, 4, FLAG_NEXT | FLAG_WRITE, 1);
    bench.descriptor(0x3101, 1, 0x3900, 1, FLAG_WRITE, 9);
    let expected = vec![(0x3000, 16, false), (0x3800, 4, true), (0x3900, 1, true)];
    assert_eq!(bench.walk(&queue, 3), Ok(expected));
}

#[test]
fn chains_that_lead_nowhere_end_with_an_error() {
    type Case = (&'static str, u64, u32, u16, u16, ChainError);
    let table = 0x3100;
    let cases: [Case; 9] = [
        (
            "points to itself",
            0x3000,
            1,
            FLAG_NEXT,
            0,
            ChainError::TooLong,
        ),
        (
            "next outside the table",
            0x3000,
            1,
            FLAG_NEXT,
            8,
            ChainError::Next,
        ),
        (
            "empty table",
            table,
            0,
            FLAG_INDIRECT,
            0,
            ChainError::Indirect,
        ),
        (
            "part of a descriptor",
            table,
            24,
            FLAG_INDIRECT,
            0,
            ChainError::Indirect,
        ),
        (
            "absurd length",
            table,
            !15u32,
            FLAG_INDIRECT,
            0,
            ChainError::Indirect,
        ),
        (
            "outside memory",
            0x9000,
            16,
            FLAG_INDIRECT,
            0,
            ChainError::Indirect,
        ),
        (
            "wraps around",
            u64::MAX - 8,
            16,
            FLAG_INDIRECT,
            0,
            ChainError::Indirect,
        ),
        (
            "continued",
            table,
            16,
            FLAG_INDIRECT | FLAG_NEXT,
            1,
            ChainError::Indirect,
        ),
        ("nested", table, 16, FLAG_INDIRECT, 0, ChainError::Indirect),
    ];
    let bench = Bench::new();
    let queue = bench.queue(false, 0);
    bench.descriptor(table, 0, table, 16, FLAG_INDIRECT, 0);
    for (what, address, len, flags, next, error) in cases {
        bench.descriptor(DESCRIPTORS, 0, address, len, flags, next);
        assert_eq!(bench.walk(&queue, 0), Err(error), "{what}");
    }
    // A loop inside a table, and a next outside it.
    bench.descriptor(DESCRIPTORS, 0, table, 32, FLAG_INDIRECT, 0);
    bench.descriptor(table, 0, 0x3000, 1, FLAG_NEXT, 1);
    bench.descriptor(table, 1, 0x3000, 1, FLAG_NEXT, 0);
    assert_eq!(bench.walk(&queue, 0), Err(ChainError::TooLong));
    bench.descriptor(DESCRIPTORS, 0, table, 48, FLAG_INDIRECT, 0);
    bench.descriptor(table, 1, 0x3000, 1, FLAG_NEXT, 3);
    assert_eq!(bench.walk(&queue, 0), Err(ChainError::Next));
    // Not negotiated.
    let options = RingOptions {
        size: 8,
        event_index: false,
        indirect: false,
    };
    let queue = Virtqueue::new(options, addresses(), 0, bench.map.map(), None).unwrap();
    assert_eq!(bench.walk(&queue, 0), Err(ChainError::Indirect));
}

#[test]
fn used_entries_appear_when_they_are_published_and_go_on_where_the_ring_stood() {
    let bench = Bench::new();
    bench.used.idx().store(65535u16.to_le());
    let mut queue = bench.queue(false, 65535);
    queue.push_used(3, 0x1_0001);
    queue.push_used(4, 7);
    assert_eq!(u16::from_le(bench.used.idx().load()), 65535);
    assert!(queue.is_to_publish() && queue.publish_and_ask() && !queue.is_to_publish());
    assert_eq!(u16::from_le(bench.used.idx().load()), 1);
    let entry = |n| bench.used.ring().ref_at(n).unwrap().load();
    let entry = |n| (entry(n).id(), entry(n).len());
    assert_eq!((entry(7), entry(0)), ((3, 0x1_0001), (4, 7)));
}

#[test]
fn drivers_that_want_no_notification_get_none() {
    let bench = Bench::new();
    let mut queue = bench.queue(false, 0);
    bench.set(AVAILABLE, AVAIL_NO_INTERRUPT);
    queue.push_used(0, 0);
    assert!(!queue.publish_and_ask());
    bench.set(AVAILABLE, 0);
    queue.push_used(0, 0);
    assert!(queue.publish_and_ask());
}

#[test]
fn the_event_index_is_obeyed_across_the_wrap_at_65535() {
    let bench = Bench::new();
    for (from, count, event, notified) in [
        (10u16, 1u16, 10u16, true),
        (10, 1, 11, false),
        (10, 1, 9, false),
        (10, 3, 12, true),
        (10, 3, 13, false),
        (65534, 3, 65535, true),
        (65534, 3, 0, true),
        (65534, 3, 1, false),
        (65534, 3, 65533, false),
        (65535, 1, 65535, true),
        (65535, 1, 0, false),
    ] {
        bench.used.idx().store(from.wrapping_sub(1).to_le());
        let mut queue = bench.queue(true, 0);
        bench.set(AVAILABLE + 4 + 16, from.wrapping_add(100));
        queue.push_used(0, 0);
        assert!(queue.publish_and_ask(), "the first time is always notified");
        bench.set(AVAILABLE + 4 + 16, event);
        for _ in 0..count {
            queue.push_used(0, 0);
        }
        assert_eq!(
            queue.publish_and_ask(),
            notified,
            "{count} from {from}, event {event}"
        );
    }
}

#[test]
fn what_arrives_before_kicks_are_on_is_not_missed() {
    for event_index in [false, true] {
        let bench = Bench::new();
        let mut queue = bench.queue(event_index, 65535);
        bench.available.idx().store(65535u16.to_le());
        queue.disable_kicks();
        assert_eq!(take(&mut queue), Ok(None));
        assert!(!queue.enable_kicks());
        if event_index {
            assert_eq!(bench.get(USED + 4 + 64), 65535);
        } else {
            assert_eq!(bench.get(USED), 0);
        }
        queue.disable_kicks();
        assert_eq!(bench.get(USED), u16::from(!event_index));
        bench.available.idx().store(0u16.to_le());
        assert!(
            queue.enable_kicks(),
            "one came between the poll and the sleep"
        );
        assert_eq!(take(&mut queue), Ok(Some(0)));
    }
}

#[test]
fn every_byte_of_the_used_ring_that_was_written_is_told_once() {
    let bench = Bench::new();
    bench.used.idx().store(5u16.to_le());
    let mut queue = bench.queue(true, 5);
    let entries = |queue: &mut Virtqueue| {
        let mut told = Vec::new();
        queue.written(|at, len| told.extend((at..at + len).step_by(2)));
        for word in [0, 2, 4 + 8 * 8] {
            let at = told.iter().position(|told| *told == word);
            told.remove(at.expect("flags, index and event are always told"));
        }
        told.iter()
            .filter(|at| *at % 8 == 4)
            .map(|at| at / 8)
            .collect::<Vec<_>>()
    };
    assert_eq!(entries(&mut queue), [0; 0]);
    for head in 0..5 {
        queue.push_used(head, 1);
    }
    // Entries 5, 6, 7 and, around the end, 0 and 1.
    assert_eq!(entries(&mut queue), [5, 6, 7, 0, 1]);
    assert_eq!(entries(&mut queue), [0; 0]);
    queue.push_used(0, 1);
    queue.publish_and_ask();
    queue.push_used(1, 1);
    // Switched on in the middle of a round: what the round returned before belongs to it.
    queue.start_logging();
    assert_eq!(entries(&mut queue), [3]);
    for head in (0..8).chain(0..8) {
        queue.push_used(head, 1);
    }
    let mut all = entries(&mut queue);
    all.sort_unstable();
    assert_eq!(all, Vec::from_iter(0..8));
}
