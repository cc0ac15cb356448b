//! The short way of a read or write in the layout that nearly all of them have: header, data and status have a
//! descriptor each and lie in one memory region each.
//!
//! It declines everything else, and everything that is wrong. [`Segments`](super::request::Segments) then reads
//! the chain anew, in any layout and with an answer to everything; where this parser does not decline, it finds
//! what that one finds.

use std::ptr::NonNull;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use vm_memory::VolatileMemory;

use super::memory::{HeldMap, Purpose};
use super::request::{HEADER_BYTES, buffer, memory_address};
use super::ring_layout::{Descriptor, descriptor};
use super::virtqueue::{Virtqueue, indirect_count};
use crate::request::{Buffer, Limits, Op, Range, SECTOR_SHIFT};

/// A valid read or write with one buffer.
#[derive(Debug)]
pub(super) struct Transfer {
    pub op: Op,
    pub range: Range,
    pub buffer: Buffer,
    pub status: NonNull<u8>,
    /// What a success writes of the chain.
    pub written_bytes: u32,
}

impl Transfer {
    /// What the chain that begins at `head` asks for, if it has the usual layout: in the ring's descriptor table or
    /// in an indirect one that lies in one memory region.
    #[inline(always)]
    pub(super) fn parse(
        queue: &Virtqueue,
        head: u16,
        map: &HeldMap,
        limits: &Limits,
        write_through: impl FnOnce() -> bool,
    ) -> Option<Self> {
        let [header, data, status] = three(queue, head, map)?;
        let len_bytes = u64::from(data.len());
        let is_usual = !header.is_write_only()
            && header.len() as usize == HEADER_BYTES
            && data.len() > 0
            && len_bytes.is_multiple_of(1 << SECTOR_SHIFT)
            && status.is_write_only()
            && status.len() == 1;
        if !is_usual {
            return None;
        }
        let header = map.guest(Purpose::Control, header.addr().0, HEADER_BYTES as u64)?;
        let status = map.guest(Purpose::Control, status.addr().0, 1)?;
        let memory = map.guest(Purpose::Data, data.addr().0, len_bytes)?;
        let kind = u32::from_le(header.get_ref(0).ok()?.load());
        let first_sector = u64::from_le(header.get_ref(8).ok()?.load());
        let (op, written_bytes) = match (kind, data.is_write_only()) {
            (VIRTIO_BLK_T_IN, true) => (Op::Read, data.len().checked_add(1)?),
            (VIRTIO_BLK_T_OUT, false) => {
                let fua = write_through();
                (Op::Write { fua }, 1)
            }
            _ => return None,
        };
        let sectors = len_bytes >> SECTOR_SHIFT;
        Some(Self {
            op,
            range: limits.check(op, first_sector, sectors).ok()?,
            buffer: buffer(memory),
            status: NonNull::new(memory_address(status))?,
            written_bytes,
        })
    }
}

/// The descriptors of a chain that has three of them.
#[inline(always)]
fn three(queue: &Virtqueue, head: u16, map: &HeldMap) -> Option<[Descriptor; 3]> {
    let mut table = queue.descriptor_table();
    let mut first = descriptor(table, head)?;
    if first.refers_to_indirect_table() {
        indirect_count(queue.options(), first)?;
        table = map.guest(Purpose::Control, first.addr().0, first.len().into())?;
        first = descriptor(table, 0)?;
    }
    let continues =
        |descriptor: Descriptor| descriptor.has_next() && !descriptor.refers_to_indirect_table();
    if !continues(first) {
        return None;
    }
    let second = descriptor(table, first.next())?;
    if !continues(second) {
        return None;
    }
    let third = descriptor(table, second.next())?;
    let ends = !third.has_next() && !third.refers_to_indirect_table();
    ends.then_some([first, second, third])
}

#[cfg(test)]
#[path = "fast_path_tests.rs"]
mod tests;
