use std::sync::Arc;

use testkit::random::Random;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::RawDescriptor;
use vm_memory::ByteValued;

use super::*;
use crate::door::vhost::memory::tests::memfd;
use crate::door::vhost::memory::{MemoryMap, Region, RegionAddress};
use crate::door::vhost::request::{ParsedRequest, RequestContext, Segments};
use crate::door::vhost::ring_layout::{Descriptor, RingAddresses, RingOptions};
use crate::request::small_disk;

const FLAG_NEXT: u16 = 1;
const FLAG_WRITE: u16 = 2;
const FLAG_INDIRECT: u16 = 4;

const SIZE: u16 = 8;
/// Guest addresses: the ring, an indirect table, and where two regions meet that are not mapped side by side.
const RING: u64 = 0;
const TABLE: u64 = 0x1000;
const BORDER: u64 = 0x8000;
const END: u64 = 0x1_0000;

/// A virtqueue and guest memory in two regions.
struct Guest {
    map: HeldMap,
    queue: Virtqueue,
}

impl Guest {
    fn new() -> Self {
        let file = memfd(END);
        let region = |guest, offset| {
            let address = RegionAddress {
                guest,
                len_bytes: BORDER,
                user: guest,
            };
            Region::map(address, &file, offset).unwrap()
        };
        let map = MemoryMap::new(vec![region(0, BORDER), region(BORDER, 0)]).unwrap();
        let options = RingOptions {
            size: SIZE,
            event_index: false,
            indirect: true,
        };
        let addresses = RingAddresses {
            descriptors: RING,
            available: RING + 0x400,
            used: RING + 0x800,
        };
        let queue = Virtqueue::new(options, addresses, 0, &map, None).unwrap();
        let map = HeldMap::new(Arc::new(map));
        Self { map, queue }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let memory = self.map.guest(Purpose::Data, at, bytes.len() as u64);
        memory.unwrap().copy_from(bytes);
    }

    fn descriptor(&self, table: u64, index: u64, descriptor: Descriptor) {
        let raw = RawDescriptor::from(descriptor);
        self.write(table + 16 * index, raw.as_slice());
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        self.write(at, &kind.to_le_bytes());
        self.write(at + 8, &sector.to_le_bytes());
    }

    /// Parses the chain both ways. Whether the fast path took it; then both found the same.
    fn compare(&self, head: u16, context: RequestContext<'_>, what: &str) -> bool {
        let RequestContext {
            limits,
            write_through,
            ..
        } = context;
        let Some(fast) = Transfer::parse(&self.queue, head, &self.map, limits, || write_through)
        else {
            return false;
        };
        let mut list = Box::new_uninit_slice(256);
        let chain = self.queue.chain(head, &self.map);
        let segments = Segments::gather(chain, &self.map, &mut list);
        let general = ParsedRequest::Start {
            op: fast.op,
            range: fast.range,
            buffers: 1,
            written_bytes: fast.written_bytes,
        };
        assert_eq!(segments.parse(context), general, "{what}");
        assert_eq!(segments.status, Some(fast.status), "{what}");
        let [buffer] = segments.buffers(0, 1) else {
            unreachable!("one was asked for");
        };
        let parts = |buffer: &Buffer| (buffer.iov_base, buffer.iov_len);
        assert_eq!(parts(buffer), parts(&fast.buffer), "{what}");
        true
    }
}

/// One of a list.
fn one_of<T: Copy>(random: &mut Random, list: &[T]) -> T {
    list[usize::try_from(random.below(list.len() as u64)).unwrap()]
}

/// The usual value, or one time in sixteen one of the others.
fn mostly<T: Copy>(random: &mut Random, usual: T, others: &[T]) -> T {
    if random.below(16) == 0 {
        one_of(random, others)
    } else {
        usual
    }
}

#[test]
fn it_declines_random_chains_or_finds_what_the_general_parser_finds() {
    let guest = Guest::new();
    let mut random = Random(1);
    let (mut taken, mut declined, mut indirect_taken) = (0, 0, 0);
    for round in 0..200_000 {
        let random = &mut random;
        let mut limits = small_disk(64 << 9);
        limits.block_bytes = mostly(random, 512, &[4096]);
        limits.read_only = mostly(random, false, &[true]);
        let context = RequestContext {
            limits: &limits,
            features: random.next_u64(),
            write_through: random.below(2) == 0,
        };
        let is_indirect = random.below(3) == 0;
        let count = mostly(random, 3, &[1, 2, 4, 5]);
        let kinds = [
            VIRTIO_BLK_T_FLUSH,
            VIRTIO_BLK_T_GET_ID,
            VIRTIO_BLK_T_DISCARD,
            VIRTIO_BLK_T_WRITE_ZEROES,
            VIRTIO_BLK_T_IN | 0x100,
            u32::MAX,
        ];
        let is_read = random.below(2) == 0;
        let kind = if is_read {
            VIRTIO_BLK_T_IN
        } else {
            VIRTIO_BLK_T_OUT
        };
        let kind = mostly(random, kind, &kinds);
        let sector = random.below(64);
        let sector = mostly(random, sector, &[64, 1 << 55, u64::MAX]);
        let header_at = one_of(random, &[0x3000, BORDER - 16, BORDER + 0x100]);
        guest.header(header_at, kind, sector);

        let table = if is_indirect { TABLE } else { RING };
        let mut text = format!("round {round}: type {kind} sector {sector} {limits:?}");
        let first = if is_indirect {
            0
        } else {
            random.below(u64::from(SIZE) - 5)
        };
        for n in 0..count {
            let is_last = n == count - 1;
            let (address, len, write) = if n == 0 {
                (header_at, 16, false)
            } else if is_last {
                let at = one_of(random, &[0x5000, BORDER - 1, BORDER, END - 1]);
                (at, 1, true)
            } else {
                let at = one_of(random, &[0x6000, BORDER - 512, BORDER, END - 4096]);
                (at, one_of(random, &[512, 1024, 4096]), is_read)
            };
            let address = mostly(random, address, &[BORDER - 8, END, u64::MAX - 8]);
            let len = mostly(
                random,
                len,
                &[0, 1, 15, 17, 511, 520, 0xffff_fe00, u32::MAX],
            );
            let write = mostly(random, write, &[!write]);
            let (next, flag) = if is_last {
                (0, 0)
            } else {
                (first + n + 1, FLAG_NEXT)
            };
            let flag = mostly(
                random,
                flag,
                &[
                    0,
                    FLAG_NEXT,
                    FLAG_INDIRECT,
                    FLAG_INDIRECT | FLAG_NEXT,
                    1 << 9,
                ],
            );
            let write = if write { FLAG_WRITE } else { 0 };
            let next = u16::try_from(next).unwrap();
            let next = mostly(random, next, &[0, SIZE - 1, SIZE, u16::MAX]);
            let descriptor = Descriptor::new(address, len, flag | write, next);
            guest.descriptor(table, first + n, descriptor);
            text += &format!("\n{}: {descriptor:x?}", first + n);
        }
        let mut head = u16::try_from(first).unwrap();
        if is_indirect {
            head = 3;
            let at = mostly(random, TABLE, &[TABLE + 8, BORDER - 24, END]);
            let len = u32::try_from(16 * count).unwrap();
            let len = mostly(random, len, &[0, 16, 40, 64, u32::MAX]);
            let flags = mostly(random, FLAG_INDIRECT, &[FLAG_INDIRECT | FLAG_NEXT]);
            let descriptor = Descriptor::new(at, len, flags, 0);
            guest.descriptor(RING, 3, descriptor);
            text += &format!("\ntable: {descriptor:x?}");
        }
        if guest.compare(head, context, &text) {
            taken += 1;
            indirect_taken += u32::from(is_indirect);
        } else {
            declined += 1;
        }
    }
    // Neither of the two hid behind the other.
    assert!(taken > 40_000 && declined > 40_000, "{taken} {declined}");
    assert!(indirect_taken > 10_000, "{indirect_taken}");
}

#[test]
fn the_usual_layout_is_taken_in_the_ring_and_in_a_table() {
    let guest = Guest::new();
    let limits = small_disk(64 << 9);
    let context = RequestContext {
        limits: &limits,
        features: 0,
        write_through: false,
    };
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let write = if kind == VIRTIO_BLK_T_IN {
            FLAG_WRITE
        } else {
            0
        };
        guest.header(0x3000, kind, 1);
        // The last table lies askew.
        for table in [RING, TABLE, TABLE + 4] {
            let entry = |index, address, len, flags, next| {
                guest.descriptor(table, index, Descriptor::new(address, len, flags, next));
            };
            entry(0, 0x3000, 16, FLAG_NEXT, 2);
            entry(2, 0x4000, 512, FLAG_NEXT | write, 1);
            entry(1, 0x5000, 1, FLAG_WRITE, 0);
            if table != RING {
                let descriptor = Descriptor::new(table, 48, FLAG_INDIRECT, 0);
                guest.descriptor(RING, 0, descriptor);
            }
            assert!(
                guest.compare(0, context, "usual"),
                "type {kind} at {table:#x}"
            );
        }
    }
}
