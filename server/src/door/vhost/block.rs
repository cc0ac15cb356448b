//! virtio-blk (virtio 1.3, 5.2): features, configuration space, and what a chain asks for.

use std::mem::MaybeUninit;
use std::ptr::NonNull;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::memory::{HeldMap, Purpose};
use super::virtqueue::{Chain, Descriptor};
use crate::request::{Buffer, IoError, Limits, Op, Range, SECTOR_SHIFT, SERIAL_BYTES};

/// Data segments of one request, as advertised.
pub(super) const SEG_MAX: usize = 126;

/// Buffers of one request: segments may straddle memory regions.
pub(super) const MAX_BUFFERS: usize = 256;

/// Where `writeback` is in the configuration space.
pub(super) const WRITEBACK_OFFSET: u32 = 32;

/// Bytes of the configuration space that are in use (up to the secure-erase fields).
const CONFIG_BYTES: usize = 60;

const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;

/// A feature bit as a mask.
pub(super) const fn mask(bit: u32) -> u64 {
    1 << bit
}

/// What a disk offers.
pub(super) fn features(limits: &Limits) -> u64 {
    let mut features = mask(VIRTIO_F_VERSION_1)
        | mask(VIRTIO_RING_F_INDIRECT_DESC)
        | mask(VIRTIO_RING_F_EVENT_IDX)
        | mask(VIRTIO_BLK_F_MQ)
        | mask(VIRTIO_BLK_F_SEG_MAX)
        | mask(VIRTIO_BLK_F_BLK_SIZE)
        | mask(VIRTIO_BLK_F_TOPOLOGY);
    for (offered, bit) in [
        (limits.write_cache, VIRTIO_BLK_F_FLUSH),
        (limits.write_cache, VIRTIO_BLK_F_CONFIG_WCE),
        (limits.max_discard_bytes != 0, VIRTIO_BLK_F_DISCARD),
        (
            limits.max_write_zeroes_bytes != 0,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ),
        (limits.read_only, VIRTIO_BLK_F_RO),
    ] {
        if offered {
            features |= mask(bit);
        }
    }
    features
}

/// `len` bytes of the configuration space from `offset`; zeroes beyond what is in use.
pub(super) fn config(
    limits: &Limits,
    queues: u16,
    writeback: bool,
    offset: u32,
    len: u32,
) -> Vec<u8> {
    let block = limits.block_bytes;
    let sectors = |bytes: u64| {
        let bytes = bytes - bytes % u64::from(block);
        u32::try_from(bytes >> SECTOR_SHIFT)
            .unwrap_or(u32::MAX - (u32::MAX % (block >> SECTOR_SHIFT)))
    };
    let seg_max = u32::try_from(SEG_MAX).unwrap_or(u32::MAX);
    let physical = limits.physical_block_bytes.max(block);
    let physical_exponent = u8::try_from((physical / block).ilog2()).unwrap_or(0);
    let min_io = u16::try_from(physical / block).unwrap_or(1);
    let mut space = [0u8; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(limits.capacity.bytes() >> SECTOR_SHIFT).to_le_bytes());
    put(12, &seg_max.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[physical_exponent, 0]);
    put(26, &min_io.to_le_bytes());
    put(28, &(limits.optimal_io_bytes / block).to_le_bytes());
    put(32, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    if limits.max_discard_bytes != 0 {
        let granularity = u64::from(limits.discard_granularity_bytes.max(block));
        put(36, &sectors(limits.max_discard_bytes).to_le_bytes());
        put(40, &1u32.to_le_bytes());
        put(44, &sectors(granularity).to_le_bytes());
    }
    if limits.max_write_zeroes_bytes != 0 {
        put(48, &sectors(limits.max_write_zeroes_bytes).to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
    }
    let (offset, len) = (offset as usize, len as usize);
    (offset..offset.saturating_add(len))
        .map(|at| space.get(at).copied().unwrap_or(0))
        .collect()
}

/// The virtio status of an outcome.
pub(super) fn status(outcome: Result<(), IoError>) -> u8 {
    let status = match outcome {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(IoError::Unsupported) => VIRTIO_BLK_S_UNSUPP,
        Err(IoError::Io | IoError::ReadOnly | IoError::NoSpace | IoError::Conflict) => {
            VIRTIO_BLK_S_IOERR
        }
    };
    u8::try_from(status).unwrap_or(1)
}

/// What must be known to understand a request.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    pub limits: &'a Limits,
    /// What the driver accepted.
    pub features: u64,
    /// Every write is to be durable when it completes.
    pub write_through: bool,
}

/// A chain, taken apart: 16 bytes of header, then data, the last writable byte is the status; in
/// any layout of descriptors (virtio 1.3, 2.7.4).
pub(super) struct Parts {
    header: [u8; HEADER_BYTES],
    header_bytes: usize,
    /// Buffers the driver sends; they come first in the list.
    out_count: usize,
    out_bytes: u64,
    /// Buffers the driver receives, without the status byte.
    in_count: usize,
    in_bytes: u64,
    /// Where the status goes, if there is room for one.
    pub status: Option<NonNull<u8>>,
    broken: bool,
}

/// A valid read or write in the layout of nearly all of them: header, data and status each have a
/// descriptor and lie in one memory region.
pub(super) struct Transfer {
    pub op: Op,
    pub range: Range,
    pub buffer: Buffer,
    pub status: NonNull<u8>,
    /// What a success writes of the chain.
    pub written_bytes: u32,
}

impl Transfer {
    /// What the three descriptors of a chain ask for. `None` for anything else, which [`Parts`] then
    /// reads anew, in any layout and with an answer to everything.
    #[inline(always)]
    pub(super) fn usual(
        [header, data, status]: [Descriptor; 3],
        map: &HeldMap,
        limits: &Limits,
        write_through: impl FnOnce() -> bool,
    ) -> Option<Self> {
        let len_bytes = u64::from(data.len_bytes);
        let is_usual = !header.is_writable()
            && header.len_bytes as usize == HEADER_BYTES
            && data.len_bytes > 0
            && len_bytes.is_multiple_of(1 << SECTOR_SHIFT)
            && status.is_writable()
            && status.len_bytes == 1;
        if !is_usual {
            return None;
        }
        let header = map.guest(Purpose::Control, header.address, HEADER_BYTES as u64)?;
        let status = map.guest(Purpose::Control, status.address, 1)?;
        let memory = map.guest(Purpose::Data, data.address, len_bytes)?;
        // SAFETY: mapped bytes of a map that is borrowed meanwhile; the driver may change them under
        // the copy, and what was copied is checked afterwards.
        let header = unsafe { header.cast::<[u8; HEADER_BYTES]>().read_unaligned() };
        let (op, written_bytes) = match (u32_at(&header, 0), data.is_writable()) {
            (VIRTIO_BLK_T_IN, true) => (Op::Read, data.len_bytes.checked_add(1)?),
            (VIRTIO_BLK_T_OUT, false) => {
                let fua = write_through();
                (Op::Write { fua }, 1)
            }
            _ => return None,
        };
        let sectors = len_bytes >> SECTOR_SHIFT;
        Some(Self {
            op,
            range: limits.check(op, u64_at(&header, 8), sectors).ok()?,
            buffer: Buffer {
                iov_base: memory.as_ptr().cast(),
                iov_len: data.len_bytes as usize,
            },
            status,
            written_bytes,
        })
    }
}

/// What is to be done with a chain.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// A request with the first `buffers` entries of the list; a success writes `written_bytes`
    /// of the chain, status included.
    Start {
        op: Op,
        range: Range,
        buffers: usize,
        written_bytes: u32,
    },
    /// An answer that needs no backend.
    Answer {
        outcome: Result<(), IoError>,
        written_bytes: u32,
    },
}

impl Parts {
    /// Collects a chain's memory into `list`. Goes on after what is wrong with a descriptor, to
    /// find the status byte.
    pub(super) fn gather(
        chain: Chain<'_>,
        map: &HeldMap,
        list: &mut [MaybeUninit<Buffer>],
    ) -> Self {
        let mut parts = Self {
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            out_count: 0,
            out_bytes: 0,
            in_count: 0,
            in_bytes: 0,
            status: None,
            broken: false,
        };
        let mut writing = false;
        for descriptor in chain {
            let Ok(descriptor) = descriptor else {
                parts.broken = true;
                break;
            };
            if descriptor.len_bytes == 0 {
                continue;
            }
            let (address, len_bytes) = (descriptor.address, u64::from(descriptor.len_bytes));
            // In one region, but for the buffer that straddles two.
            let purpose = if descriptor.len_bytes as usize <= HEADER_BYTES {
                Purpose::Control
            } else {
                Purpose::Data
            };
            let whole = map.guest(purpose, address, len_bytes);
            let added = if descriptor.is_writable() {
                writing = true;
                parts.in_bytes += len_bytes;
                if let Some(at) = whole {
                    let at = at.as_ptr();
                    let last = at.wrapping_add(descriptor.len_bytes as usize - 1);
                    parts.status = NonNull::new(last);
                    parts.receive(list, at, descriptor.len_bytes as usize)
                } else {
                    let last = address.checked_add(len_bytes - 1);
                    parts.status = last.and_then(|last| map.guest(purpose, last, 1));
                    map.pieces(address, len_bytes, |at, len| parts.receive(list, at, len))
                }
            } else if writing {
                // All that the device reads comes before all that it writes (2.7.4.2).
                None
            } else {
                parts.out_bytes += len_bytes;
                if let Some(at) = whole {
                    parts.send(list, at.as_ptr(), descriptor.len_bytes as usize)
                } else {
                    map.pieces(address, len_bytes, |at, len| parts.send(list, at, len))
                }
            };
            parts.broken |= added.is_none();
        }
        parts.broken |= parts.header_bytes < HEADER_BYTES || parts.status.is_none();
        if !parts.broken {
            parts.out_bytes -= HEADER_BYTES as u64;
            parts.in_bytes -= 1;
            // SAFETY: `add` filled the first `out_count + in_count` entries; a status byte means
            // that there is at least one of the latter.
            let last = unsafe { list[parts.out_count + parts.in_count - 1].assume_init_mut() };
            last.iov_len -= 1;
            if last.iov_len == 0 {
                parts.in_count -= 1;
            }
        }
        parts
    }

    /// Adds memory that the driver sends: the header first, then data. The caller's map holds it.
    #[inline]
    fn send(
        &mut self,
        list: &mut [MaybeUninit<Buffer>],
        mut at: *mut u8,
        mut len: usize,
    ) -> Option<()> {
        if self.header_bytes == 0 && len >= HEADER_BYTES {
            // SAFETY: mapped bytes of a map that is borrowed meanwhile; the driver may change them
            // under the copy, and what was copied is checked afterwards.
            self.header = unsafe { at.cast::<[u8; HEADER_BYTES]>().read_unaligned() };
            self.header_bytes = HEADER_BYTES;
            at = at.wrapping_add(HEADER_BYTES);
            len -= HEADER_BYTES;
        } else if self.header_bytes < HEADER_BYTES {
            let take = len.min(HEADER_BYTES - self.header_bytes);
            let header = &mut self.header[self.header_bytes..];
            // SAFETY: as above; `take` fits what is left of the header.
            unsafe { at.copy_to_nonoverlapping(header.as_mut_ptr(), take) };
            self.header_bytes += take;
            at = at.wrapping_add(take);
            len -= take;
        }
        if len == 0 {
            return Some(());
        }
        add(list, 0, &mut self.out_count, at, len)
    }

    /// Adds memory that the driver receives.
    #[inline]
    fn receive(&mut self, list: &mut [MaybeUninit<Buffer>], at: *mut u8, len: usize) -> Option<()> {
        add(list, self.out_count, &mut self.in_count, at, len)
    }

    /// The buffers that the device may write, without the status byte.
    pub(super) fn received<'a>(
        &self,
        list: &'a [MaybeUninit<Buffer>],
    ) -> impl Iterator<Item = &'a Buffer> + use<'a> {
        self.buffers(list, self.out_count, self.in_count)
    }

    /// What the chain asks for.
    pub(super) fn judge(&self, list: &[MaybeUninit<Buffer>], terms: Terms<'_>) -> Verdict {
        self.request(list, terms)
            .unwrap_or_else(|error| Verdict::Answer {
                outcome: Err(error),
                written_bytes: u32::from(self.status.is_some()),
            })
    }

    fn request(&self, list: &[MaybeUninit<Buffer>], terms: Terms<'_>) -> Result<Verdict, IoError> {
        if self.broken {
            return Err(IoError::Io);
        }
        let kind = u32_at(&self.header, 0);
        let first_sector = u64_at(&self.header, 8);
        let fua = terms.write_through;
        match kind {
            VIRTIO_BLK_T_IN => {
                if self.out_bytes != 0 {
                    return Err(IoError::Io);
                }
                self.transfer(Op::Read, first_sector, self.in_bytes, terms.limits)
            }
            VIRTIO_BLK_T_OUT => {
                if self.in_bytes != 0 {
                    return Err(IoError::Io);
                }
                let op = Op::Write { fua };
                self.transfer(op, first_sector, self.out_bytes, terms.limits)
            }
            VIRTIO_BLK_T_FLUSH => Ok(Verdict::Start {
                op: Op::Flush,
                range: Range::EMPTY,
                buffers: 0,
                written_bytes: 1,
            }),
            VIRTIO_BLK_T_GET_ID => self.get_id(list, terms.limits),
            VIRTIO_BLK_T_DISCARD if terms.features & mask(VIRTIO_BLK_F_DISCARD) != 0 => {
                let (first_sector, sectors, flags) = self.segment(list)?;
                if flags != 0 {
                    return Err(IoError::Unsupported);
                }
                ranged(Op::Discard, first_sector, sectors, terms.limits)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if terms.features & mask(VIRTIO_BLK_F_WRITE_ZEROES) != 0 => {
                let (first_sector, sectors, flags) = self.segment(list)?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(IoError::Unsupported);
                }
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let op = Op::WriteZeroes { unmap, fua };
                ranged(op, first_sector, sectors, terms.limits)
            }
            _ => Err(IoError::Unsupported),
        }
    }

    fn transfer(
        &self,
        op: Op,
        first_sector: u64,
        len_bytes: u64,
        limits: &Limits,
    ) -> Result<Verdict, IoError> {
        if !len_bytes.is_multiple_of(1 << SECTOR_SHIFT) {
            return Err(IoError::Io);
        }
        // The used entry has 32 bits for what was written.
        let in_bytes = u32::try_from(self.in_bytes).map_err(|_| IoError::Io)?;
        let written_bytes = in_bytes.checked_add(1).ok_or(IoError::Io)?;
        let range = limits.check(op, first_sector, len_bytes >> SECTOR_SHIFT)?;
        if range.len_bytes == 0 {
            return Ok(done(1));
        }
        // The other direction has no data, so all buffers of the list belong to this one.
        Ok(Verdict::Start {
            op,
            range,
            buffers: self.out_count + self.in_count,
            written_bytes,
        })
    }

    fn get_id(&self, list: &[MaybeUninit<Buffer>], limits: &Limits) -> Result<Verdict, IoError> {
        if self.in_bytes == 0 {
            return Err(IoError::Io);
        }
        let mut id = limits.serial.as_bytes().as_slice();
        for buffer in self.buffers(list, self.out_count, self.in_count) {
            let take = id.len().min(buffer.iov_len);
            // SAFETY: the buffers of the list are mapped as long as the map that the caller holds.
            unsafe {
                buffer
                    .iov_base
                    .cast::<u8>()
                    .copy_from_nonoverlapping(id.as_ptr(), take)
            };
            id = &id[take..];
        }
        let copied = SERIAL_BYTES - id.len();
        Ok(done(u32::try_from(copied + 1).unwrap_or(1)))
    }

    /// The one segment of a discard or write-zeroes: first sector, sectors, flags.
    fn segment(&self, list: &[MaybeUninit<Buffer>]) -> Result<(u64, u64, u32), IoError> {
        let segment_bytes = SEGMENT_BYTES as u64;
        let whole = self.out_bytes.is_multiple_of(segment_bytes);
        if self.in_bytes != 0 || self.out_bytes == 0 || !whole {
            return Err(IoError::Io);
        }
        if self.out_bytes != segment_bytes {
            return Err(IoError::Unsupported);
        }
        let mut segment = [0u8; SEGMENT_BYTES];
        let mut filled = 0;
        for buffer in self.buffers(list, 0, self.out_count) {
            let take = buffer.iov_len.min(SEGMENT_BYTES - filled);
            let to = segment[filled..].as_mut_ptr();
            // SAFETY: as for `get_id`, in the other direction; `take` fits the rest of the array.
            unsafe { to.copy_from_nonoverlapping(buffer.iov_base.cast(), take) };
            filled += take;
        }
        let sectors = u32_at(&segment, 8);
        Ok((
            u64_at(&segment, 0),
            u64::from(sectors),
            u32_at(&segment, 12),
        ))
    }

    fn buffers<'a>(
        &self,
        list: &'a [MaybeUninit<Buffer>],
        first: usize,
        count: usize,
    ) -> impl Iterator<Item = &'a Buffer> + use<'a> {
        debug_assert!(first + count <= self.out_count + self.in_count);
        // SAFETY: `gather` filled the first `out_count + in_count` entries.
        list[first..first + count]
            .iter()
            .map(|entry| unsafe { entry.assume_init_ref() })
    }
}

fn ranged(op: Op, first_sector: u64, sectors: u64, limits: &Limits) -> Result<Verdict, IoError> {
    let range = limits.check(op, first_sector, sectors)?;
    if range.len_bytes == 0 {
        return Ok(done(1));
    }
    Ok(Verdict::Start {
        op,
        range,
        buffers: 0,
        written_bytes: 1,
    })
}

fn done(written_bytes: u32) -> Verdict {
    Verdict::Answer {
        outcome: Ok(()),
        written_bytes,
    }
}

/// Adds a buffer after the `count` that are in the list from `first`; extends the last one when
/// the memory goes on there.
#[inline]
fn add(
    list: &mut [MaybeUninit<Buffer>],
    first: usize,
    count: &mut usize,
    at: *mut u8,
    len_bytes: usize,
) -> Option<()> {
    if let Some(last) = count.checked_sub(1) {
        // SAFETY: entries below `first + count` were filled by earlier calls.
        let last = unsafe { list[first + last].assume_init_mut() };
        if last.iov_base.wrapping_byte_add(last.iov_len) == at.cast() {
            last.iov_len = last.iov_len.checked_add(len_bytes)?;
            return Some(());
        }
    }
    list.get_mut(first + *count)?.write(Buffer {
        iov_base: at.cast(),
        iov_len: len_bytes,
    });
    *count += 1;
    Some(())
}

fn u32_at(bytes: &[u8; 16], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
