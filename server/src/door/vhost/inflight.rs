//! The record of requests in flight, in memory that the client keeps and that outlives this process
//! (vhost-user, "Inflight I/O tracking", split virtqueues).
//!
//! A server that comes after one that died finds in it which chains were in flight, and in which
//! order, and resubmits them. The client could write to it; everything is checked.
//!
//! A server may die between any two stores, and what it stored is there for the next one in the order
//! in which it was stored. Hence `Release` for all that has a place in the order: a compiler must not
//! move it before what comes first. (No other process reads it while the server lives.)
//!
//! ```text
//! queue i, at i * stride:   features u64, version u16, desc_num u16, last_batch_head u16, used_idx u16
//! then per descriptor:      inflight u8, padding [u8; 5], next u16, counter u64
//! ```

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::sync::atomic::Ordering;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::AtomicAccess;

use super::config::MAX_VRINGS;
use super::memory::{Region, RegionAddress};
use super::ring_layout::MAX_QUEUE_SIZE;
use super::shared::Shared;
use crate::door::ownership::MemoryId;
use crate::engine::crash;

const HEADER_BYTES: usize = 16;
const ENTRY_BYTES: usize = 16;
/// Each queue's part begins at a multiple of this.
const ALIGNMENT: u64 = 64;
/// The version of the layout above.
const VERSION: u16 = 1;

const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_AT: usize = 12;
const USED_AT: usize = 14;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// The shared buffer of a session.
#[derive(Clone, Debug)]
pub(super) struct InflightBuffer {
    memory: Shared,
    id: MemoryId,
    queues: u16,
    queue_size: u16,
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what.to_owned())
}

fn stride_bytes(queue_size: u16) -> u64 {
    (entry(queue_size) as u64).next_multiple_of(ALIGNMENT)
}

fn checked(queues: u16, queue_size: u16) -> io::Result<u64> {
    let fits = (1..=MAX_VRINGS).contains(&queues)
        && queue_size > 0
        && u32::from(queue_size) <= MAX_QUEUE_SIZE;
    if !fits {
        return Err(invalid("an inflight buffer for queues that there are not"));
    }
    Ok(u64::from(queues) * stride_bytes(queue_size))
}

/// The largest ring that the buffer has room for. It is a matter of the buffer's length, because QEMU
/// gives back the length that it was told and the queue size that it asked for.
fn room(told: &VhostUserInflight) -> u16 {
    let stride = told.mmap_size / u64::from(told.num_queues) / ALIGNMENT * ALIGNMENT;
    let entries = stride.saturating_sub(HEADER_BYTES as u64) / ENTRY_BYTES as u64;
    let entries = entries.min(u64::from(MAX_QUEUE_SIZE));
    u16::try_from(entries).unwrap_or(u16::MAX)
}

/// The largest ring of a virtio-mmio device in QEMU, whatever its `queue-size=` says.
const LARGEST_MMIO_RING: u16 = 1024;

impl InflightBuffer {
    /// A new buffer: what the client is told, and the file that it is to keep.
    ///
    /// # Errors
    ///
    /// When the client asks for queues that are not offered, or there is no memory.
    pub(super) fn create(wanted: &VhostUserInflight) -> io::Result<(VhostUserInflight, File)> {
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        checked(queues, queue_size)?;
        let len_bytes = checked(queues, queue_size.max(LARGEST_MMIO_RING))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("vhost-inflight", flags)?;
        ftruncate(&file, len_bytes)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let told = VhostUserInflight::new(len_bytes, 0, queues, queue_size);
        Ok((told, File::from(file)))
    }

    /// The buffer that a client sent back.
    ///
    /// # Errors
    ///
    /// When it is too small for its queues or cannot be mapped.
    pub(super) fn map(told: &VhostUserInflight, file: &File) -> io::Result<Self> {
        let needed = checked(told.num_queues, told.queue_size)?;
        if told.mmap_size < needed {
            return Err(invalid("an inflight buffer is too small for its queues"));
        }
        let queue_size = room(told);
        let needed = checked(told.num_queues, queue_size)?;
        if !told.mmap_offset.is_multiple_of(ALIGNMENT) {
            return Err(invalid("an inflight buffer is not aligned"));
        }
        let address = RegionAddress {
            guest: 0,
            len_bytes: needed,
            user: 0,
        };
        let region = Region::map(address, file, told.mmap_offset)?;
        Ok(Self {
            memory: region.memory().clone(),
            id: MemoryId::of(file)?,
            queues: told.num_queues,
            queue_size,
        })
    }

    /// What tells its memory from that of other clients.
    pub(super) fn id(&self) -> MemoryId {
        self.id
    }

    /// Forgets all chains: a device that was reset has none in flight, also of a ring that was broken.
    pub(super) fn clear(&self) {
        for queue in (0..self.queues).filter_map(|index| self.queue(index, self.queue_size).ok()) {
            for head in 0..self.queue_size {
                queue.flag(head).store(0, Ordering::Release);
            }
        }
    }

    /// The part of vring `index`.
    ///
    /// # Errors
    ///
    /// When the buffer has none for a ring of this size.
    pub(super) fn queue(&self, index: u16, size: u16) -> io::Result<InflightQueue> {
        if index >= self.queues || size > self.queue_size {
            return Err(invalid("the inflight buffer has no room for this vring"));
        }
        let stride = stride_bytes(self.queue_size);
        let memory = self.memory.part(u64::from(index) * stride, stride);
        Ok(InflightQueue {
            memory: memory.ok_or_else(|| invalid("the inflight buffer is too small"))?,
            entries: self.queue_size,
            size,
            counter: 0,
            batch: Vec::with_capacity(size.into()),
        })
    }
}

/// The record of one vring.
#[derive(Debug)]
pub(super) struct InflightQueue {
    memory: Shared,
    /// Descriptors that the record has room for.
    entries: u16,
    /// Descriptors of the ring, no more than that.
    size: u16,
    /// The number of the next chain that is popped.
    counter: u64,
    /// Chains returned whose used entries are not yet published.
    batch: Vec<u16>,
}

/// The record contradicts the ring or itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadRecord;

impl InflightQueue {
    /// Chains that were in flight when the last server ended, in the order in which it took them.
    /// `used` is the ring's used index.
    ///
    /// # Errors
    ///
    /// When the record makes no sense.
    pub(super) fn recover(&mut self, used: u16) -> Result<Vec<u16>, BadRecord> {
        let in_flight = |head: &u16| self.flag(*head).load(Ordering::Acquire) != 0;
        if !(0..self.entries).any(|head| in_flight(&head)) {
            // New, or of a ring that was stopped in order: a guest that was reset begins again, and
            // its next driver may like another size.
            self.word(DESC_NUM_AT)
                .store(self.entries, Ordering::Relaxed);
            self.word(USED_AT).store(used, Ordering::Relaxed);
            self.word(VERSION_AT).store(VERSION, Ordering::Release);
            return Ok(Vec::new());
        }
        if self.word(VERSION_AT).load(Ordering::Relaxed) != VERSION
            || self.word(DESC_NUM_AT).load(Ordering::Relaxed) != self.entries
            || (self.size..self.entries).any(|head| in_flight(&head))
        {
            return Err(BadRecord);
        }
        // The last server ended between publishing a batch and noting that it had.
        let published = used.wrapping_sub(self.word(USED_AT).load(Ordering::Relaxed));
        if published > self.size {
            return Err(BadRecord);
        }
        let mut head = self.word(LAST_BATCH_AT).load(Ordering::Relaxed);
        for _ in 0..published {
            if head >= self.size {
                return Err(BadRecord);
            }
            self.flag(head).store(0, Ordering::Release);
            crash::request_point("repair-begun");
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.word(USED_AT).store(used, Ordering::Release);
        crash::request_point("repair-done");
        let mut chains: Vec<(u64, u16)> = (0..self.size)
            .filter(in_flight)
            .map(|head| (self.number(head).load(Ordering::Relaxed), head))
            .collect();
        chains.sort_unstable();
        self.counter = chains
            .last()
            .map_or(0, |&(number, _)| number.wrapping_add(1));
        Ok(chains.into_iter().map(|(_, head)| head).collect())
    }

    /// A chain was popped from the ring. The caller has checked its head.
    #[inline(never)]
    pub(super) fn take(&mut self, head: u16) {
        self.number(head).store(self.counter, Ordering::Relaxed);
        self.counter = self.counter.wrapping_add(1);
        crash::request_point("chain-numbered");
        self.flag(head).store(1, Ordering::Release);
        crash::request_point("chain-on-record");
    }

    /// A chain is being returned; the driver does not see it yet.
    #[inline(never)]
    pub(super) fn returned(&mut self, head: u16) {
        let last = self.word(LAST_BATCH_AT).load(Ordering::Relaxed);
        self.next(head).store(last, Ordering::Relaxed);
        crash::request_point("answer-linked");
        self.word(LAST_BATCH_AT).store(head, Ordering::Release);
        self.batch.push(head);
        crash::request_point("answer-in-batch");
    }

    /// The driver sees what was returned: the ring's used index is `used`.
    #[inline(never)]
    pub(super) fn published(&mut self, used: u16) {
        for &head in &self.batch {
            // Not before the driver's index: it would be lost if the server died in between.
            self.flag(head).store(0, Ordering::Release);
            crash::request_point("answer-off-record");
        }
        self.batch.clear();
        self.word(USED_AT).store(used, Ordering::Release);
        crash::request_point("batch-noted");
    }

    /// Whether the client took the memory away.
    pub(super) fn is_poisoned(&self) -> bool {
        self.memory.is_poisoned()
    }

    fn word(&self, at: usize) -> Field<'_, u16> {
        Field::new(&self.memory, at)
    }

    fn flag(&self, head: u16) -> Field<'_, u8> {
        Field::new(&self.memory, entry(head))
    }

    fn next(&self, head: u16) -> Field<'_, u16> {
        Field::new(&self.memory, entry(head) + NEXT_AT)
    }

    fn number(&self, head: u16) -> Field<'_, u64> {
        Field::new(&self.memory, entry(head) + COUNTER_AT)
    }
}

/// Where the entry of a descriptor begins.
fn entry(head: u16) -> usize {
    HEADER_BYTES + ENTRY_BYTES * usize::from(head)
}

/// A field of the record.
struct Field<'a, T> {
    memory: &'a Shared,
    at: usize,
    kind: PhantomData<T>,
}

impl<'a, T: AtomicAccess> Field<'a, T> {
    fn new(memory: &'a Shared, at: usize) -> Self {
        Self {
            memory,
            at,
            kind: PhantomData,
        }
    }

    fn load(&self, order: Ordering) -> T {
        self.memory.load(self.at, order)
    }

    fn store(&self, value: T, order: Ordering) {
        self.memory.store(self.at, value, order);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u16 = 8;

    fn buffer() -> InflightBuffer {
        let wanted = VhostUserInflight::new(0, 0, 2, SIZE);
        let (told, file) = InflightBuffer::create(&wanted).unwrap();
        assert_eq!(told.mmap_size, 2 * stride_bytes(LARGEST_MMIO_RING));
        InflightBuffer::map(&told, &file).unwrap()
    }

    fn fresh(buffer: &InflightBuffer) -> InflightQueue {
        buffer.queue(1, SIZE).unwrap()
    }

    #[test]
    fn what_was_taken_and_not_returned_is_found_in_its_order() {
        let buffer = buffer();
        let mut queue = fresh(&buffer);
        assert_eq!(queue.recover(100), Ok(vec![]));
        for head in [5, 2, 7, 0] {
            queue.take(head);
        }
        queue.returned(2);
        queue.published(101);
        assert_eq!(fresh(&buffer).recover(101), Ok(vec![5, 7, 0]));
        // The next one numbers on from there.
        let mut next = fresh(&buffer);
        next.recover(101).unwrap();
        next.take(2);
        assert_eq!(fresh(&buffer).recover(101), Ok(vec![5, 7, 0, 2]));
        // The other queue has nothing to do with it.
        assert_eq!(buffer.queue(0, SIZE).unwrap().recover(0), Ok(vec![]));
    }

    #[test]
    fn a_batch_that_was_shown_and_not_noted_is_not_done_again() {
        let buffer = buffer();
        let mut queue = fresh(&buffer);
        queue.recover(0).unwrap();
        for head in [1, 2, 3, 4] {
            queue.take(head);
        }
        queue.returned(3);
        queue.returned(1);
        // It dies here: before the driver sees them all are done again, after that two are not.
        assert_eq!(fresh(&buffer).recover(0), Ok(vec![1, 2, 3, 4]));
        assert_eq!(fresh(&buffer).recover(2), Ok(vec![2, 4]));
        assert_eq!(fresh(&buffer).recover(2), Ok(vec![2, 4]));
    }

    #[test]
    fn a_record_that_makes_no_sense_is_refused() {
        let spoil = |what: fn(&mut InflightQueue)| {
            let buffer = buffer();
            let mut queue = fresh(&buffer);
            queue.recover(0).unwrap();
            queue.take(1);
            what(&mut queue);
            fresh(&buffer).recover(3)
        };
        assert!(spoil(|_| {}).is_ok());
        assert_eq!(
            spoil(|q| q.word(VERSION_AT).store(2, Ordering::Relaxed)),
            Err(BadRecord)
        );
        assert_eq!(
            spoil(|q| q.word(DESC_NUM_AT).store(4, Ordering::Relaxed)),
            Err(BadRecord)
        );
        assert_eq!(
            spoil(|q| q.word(USED_AT).store(9, Ordering::Relaxed)),
            Err(BadRecord)
        );
        assert_eq!(
            spoil(|q| q.word(LAST_BATCH_AT).store(SIZE, Ordering::Relaxed)),
            Err(BadRecord)
        );
    }

    #[test]
    fn a_ring_that_was_stopped_in_order_may_begin_again_in_another_size() {
        let buffer = buffer();
        let mut queue = fresh(&buffer);
        queue.recover(0).unwrap();
        queue.take(7);
        queue.returned(7);
        queue.published(1);
        let mut small = buffer.queue(1, SIZE / 2).unwrap();
        assert_eq!(small.recover(0), Ok(vec![]));
        small.take(3);
        assert_eq!(buffer.queue(1, SIZE / 2).unwrap().recover(0), Ok(vec![3]));
        // A head that the ring does not have was not in flight on it.
        assert_eq!(buffer.queue(1, 2).unwrap().recover(0), Err(BadRecord));
    }

    #[test]
    fn a_buffer_that_was_cleared_has_no_chain_of_any_queue() {
        let buffer = buffer();
        for index in 0..2 {
            let mut queue = buffer.queue(index, SIZE).unwrap();
            queue.recover(0).unwrap();
            queue.take(SIZE - 1);
        }
        buffer.clear();
        for index in 0..2 {
            assert_eq!(buffer.queue(index, SIZE).unwrap().recover(9), Ok(vec![]));
        }
    }

    #[test]
    fn buffers_that_do_not_fit_are_refused() {
        for (queues, size) in [(0, 8), (MAX_VRINGS + 1, 8), (1, 0), (1, 32769)] {
            let wanted = VhostUserInflight::new(0, 0, queues, size);
            assert!(InflightBuffer::create(&wanted).is_err(), "{queues} {size}");
        }
        let (told, file) = InflightBuffer::create(&VhostUserInflight::new(0, 0, 1, 8)).unwrap();
        let map = |size, offset| {
            InflightBuffer::map(&VhostUserInflight::new(size, offset, 1, 8), &file).is_ok()
        };
        assert!(map(told.mmap_size, 0));
        assert!(!map(192 - 1, 0));
        // QEMU's virtio-mmio: rings longer than what was asked for.
        assert!(buffer().queue(1, LARGEST_MMIO_RING).is_ok());
        assert!(!map(told.mmap_size, 64), "longer than its file");
        assert!(!map(told.mmap_size, 1));
        let buffer = buffer();
        assert!(buffer.queue(2, SIZE).is_err());
        assert!(buffer.queue(0, LARGEST_MMIO_RING * 2).is_err());
    }
}
