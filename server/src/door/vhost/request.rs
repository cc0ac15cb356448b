//! What a chain asks of a virtio-blk device (virtio 1.3, 5.2.6).

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_BARRIER, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::VolatileSlice;

use super::config_space::mask;
use super::memory::{HeldMap, Purpose};
use super::virtqueue::Chain;
use crate::request::{Buffer, IoError, Limits, Op, Range, SECTOR_SHIFT, SERIAL_BYTES};

/// Buffers of one request: segments may straddle memory regions.
pub(super) const MAX_BUFFERS: usize = 256;

/// Bytes of a request's header: type, reserved, first sector.
pub(super) const HEADER_BYTES: usize = 16;
const SEGMENT_BYTES: usize = 16;

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

/// What a request is parsed against.
#[derive(Clone, Copy)]
pub(super) struct RequestContext<'a> {
    pub limits: &'a Limits,
    /// What the driver accepted.
    pub features: u64,
    /// Every write is to be durable when it completes.
    pub write_through: bool,
}

/// The memory of a chain: 16 bytes of header, then data, the last writable byte is the status; in
/// any layout of descriptors (virtio 1.3, 2.7.4).
pub(super) struct Segments<'a> {
    map: PhantomData<&'a HeldMap>,
    /// Buffers the driver sends, then those it receives, without header and status. All lie in `map`.
    list: &'a mut [MaybeUninit<Buffer>],
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
    /// Where a buffer is that is not in the map, as a whole or in part.
    pub unmapped: Option<u64>,
    broken: bool,
}

/// What a chain asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ParsedRequest {
    /// A request with the first `buffers` entries of the list; a success writes `written_bytes`
    /// of the chain, status included.
    Start {
        op: Op,
        range: Range,
        buffers: usize,
        written_bytes: u32,
    },
    /// An answer that needs no storage.
    Answer {
        outcome: Result<(), IoError>,
        written_bytes: u32,
    },
}

impl<'a> Segments<'a> {
    /// Collects a chain's memory into `list`. Continues after what is wrong with a descriptor, to
    /// find the status byte.
    pub(super) fn gather(
        chain: Chain<'_>,
        map: &'a HeldMap,
        list: &'a mut [MaybeUninit<Buffer>],
    ) -> Self {
        let mut segments = Self {
            map: PhantomData,
            list,
            header: [0; HEADER_BYTES],
            header_bytes: 0,
            out_count: 0,
            out_bytes: 0,
            in_count: 0,
            in_bytes: 0,
            status: None,
            unmapped: None,
            broken: false,
        };
        let mut writing = false;
        for descriptor in chain {
            let Ok(descriptor) = descriptor else {
                segments.broken = true;
                break;
            };
            let (address, len_bytes) = (descriptor.addr().0, u64::from(descriptor.len()));
            if len_bytes == 0 {
                continue;
            }
            // In one region, but for the buffer that straddles two.
            let purpose = if len_bytes <= HEADER_BYTES as u64 {
                Purpose::Control
            } else {
                Purpose::Data
            };
            let whole = map.guest(purpose, address, len_bytes);
            let added = if descriptor.is_write_only() {
                writing = true;
                segments.in_bytes += len_bytes;
                let last = address.checked_add(len_bytes - 1);
                let last = last.and_then(|last| map.guest(purpose, last, 1));
                segments.status = last.and_then(|last| NonNull::new(memory_address(last)));
                match whole {
                    Some(part) => segments.receive(part),
                    None => map
                        .map()
                        .parts(address, len_bytes, |part| segments.receive(part)),
                }
            } else if writing {
                // All that the device reads comes before all that it writes (2.7.4.2).
                None
            } else {
                segments.out_bytes += len_bytes;
                match whole {
                    Some(part) => segments.send(part),
                    None => map
                        .map()
                        .parts(address, len_bytes, |part| segments.send(part)),
                }
            };
            if added.is_none() {
                segments.broken = true;
                let is_mapped = || map.map().parts(address, len_bytes, |_| Some(())).is_some();
                if !is_mapped() {
                    segments.unmapped.get_or_insert(address);
                }
            }
        }
        segments.broken |= segments.header_bytes < HEADER_BYTES || segments.status.is_none();
        if !segments.broken {
            segments.out_bytes -= HEADER_BYTES as u64;
            segments.in_bytes -= 1;
            let last = segments.out_count + segments.in_count - 1;
            // SAFETY: `add` filled the first `out_count + in_count` entries; a status byte means
            // that there is at least one of the latter.
            let last = unsafe { segments.list[last].assume_init_mut() };
            last.iov_len -= 1;
            if last.iov_len == 0 {
                segments.in_count -= 1;
            }
        }
        segments
    }

    /// Adds memory that the driver sends: the header first, then data.
    #[inline]
    fn send(&mut self, part: VolatileSlice<'_>) -> Option<()> {
        let copied = part.copy_to(&mut self.header[self.header_bytes..]);
        self.header_bytes += copied;
        let data = part.offset(copied).ok()?;
        if data.is_empty() {
            return Some(());
        }
        add(self.list, 0, &mut self.out_count, data)
    }

    /// Adds memory that the driver receives.
    #[inline]
    fn receive(&mut self, part: VolatileSlice<'_>) -> Option<()> {
        add(self.list, self.out_count, &mut self.in_count, part)
    }

    /// The buffers that the device may write, without the status byte.
    pub(super) fn received(&self) -> &[Buffer] {
        self.buffers(self.out_count, self.in_count)
    }

    /// What the chain asks for.
    pub(super) fn parse(&self, context: RequestContext<'_>) -> ParsedRequest {
        self.parse_valid(context)
            .unwrap_or_else(|error| ParsedRequest::Answer {
                outcome: Err(error),
                written_bytes: u32::from(self.status.is_some()),
            })
    }

    fn parse_valid(&self, context: RequestContext<'_>) -> Result<ParsedRequest, IoError> {
        if self.broken {
            return Err(IoError::Io);
        }
        // Legacy drivers may set it, also where barriers are not offered; QEMU and SPDK ignore it.
        let kind = u32_at(&self.header, 0) & !VIRTIO_BLK_T_BARRIER;
        let first_sector = u64_at(&self.header, 8);
        let fua = context.write_through;
        match kind {
            VIRTIO_BLK_T_IN => {
                if self.out_bytes != 0 {
                    return Err(IoError::Io);
                }
                // The used entry has 32 bits for what was written.
                let in_bytes = u32::try_from(self.in_bytes).ok();
                let written_bytes = in_bytes.and_then(|bytes| bytes.checked_add(1));
                let buffers = (self.in_count, written_bytes.ok_or(IoError::Io)?);
                Self::transfer(
                    Op::Read,
                    first_sector,
                    self.in_bytes,
                    buffers,
                    context.limits,
                )
            }
            VIRTIO_BLK_T_OUT => {
                if self.out_bytes == 0 && self.in_bytes != 0 {
                    return Err(IoError::Io);
                }
                let op = Op::Write { fua };
                // The status is the last of the writable bytes, however many there are.
                let buffers = (self.out_count, 1);
                Self::transfer(op, first_sector, self.out_bytes, buffers, context.limits)
            }
            VIRTIO_BLK_T_FLUSH => Ok(ParsedRequest::Start {
                op: Op::Flush,
                range: Range::EMPTY,
                buffers: 0,
                written_bytes: 1,
            }),
            VIRTIO_BLK_T_GET_ID => self.get_id(context.limits),
            VIRTIO_BLK_T_DISCARD if context.features & mask(VIRTIO_BLK_F_DISCARD) != 0 => {
                let (first_sector, sectors, flags) = self.segment()?;
                if flags != 0 {
                    return Err(IoError::Unsupported);
                }
                ranged(Op::Discard, first_sector, sectors, context.limits)
            }
            VIRTIO_BLK_T_WRITE_ZEROES
                if context.features & mask(VIRTIO_BLK_F_WRITE_ZEROES) != 0 =>
            {
                let (first_sector, sectors, flags) = self.segment()?;
                if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
                    return Err(IoError::Unsupported);
                }
                let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let op = context.limits.write_zeroes(unmap, fua);
                ranged(op, first_sector, sectors, context.limits)
            }
            _ => Err(IoError::Unsupported),
        }
    }

    /// A read or write of the first `buffers` of the list, of which a success writes `written_bytes`.
    fn transfer(
        op: Op,
        first_sector: u64,
        len_bytes: u64,
        (buffers, written_bytes): (usize, u32),
        limits: &Limits,
    ) -> Result<ParsedRequest, IoError> {
        if !len_bytes.is_multiple_of(1 << SECTOR_SHIFT) {
            return Err(IoError::Io);
        }
        let range = limits.check(op, first_sector, len_bytes >> SECTOR_SHIFT)?;
        if range.len_bytes() == 0 {
            return Ok(done(1));
        }
        Ok(ParsedRequest::Start {
            op,
            range,
            buffers,
            written_bytes,
        })
    }

    fn get_id(&self, limits: &Limits) -> Result<ParsedRequest, IoError> {
        if self.in_bytes == 0 {
            return Err(IoError::Io);
        }
        let mut id = limits.serial.as_bytes().as_slice();
        for part in self.memory(self.out_count, self.in_count) {
            let take = id.len().min(part.len());
            part.copy_from(&id[..take]);
            id = &id[take..];
        }
        let copied = SERIAL_BYTES - id.len();
        Ok(done(u32::try_from(copied + 1).unwrap_or(1)))
    }

    /// The one segment of a discard or write-zeroes: first sector, sectors, flags.
    fn segment(&self) -> Result<(u64, u64, u32), IoError> {
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
        for part in self.memory(0, self.out_count) {
            filled += part.copy_to(&mut segment[filled..]);
        }
        let sectors = u32_at(&segment, 8);
        Ok((
            u64_at(&segment, 0),
            u64::from(sectors),
            u32_at(&segment, 12),
        ))
    }

    /// `count` buffers of the list from `first` on.
    pub(super) fn buffers(&self, first: usize, count: usize) -> &[Buffer] {
        debug_assert!(first + count <= self.out_count + self.in_count);
        let list = &self.list[first..first + count];
        // SAFETY: `gather` filled the first `out_count + in_count` entries.
        unsafe { &*(std::ptr::from_ref(list) as *const [Buffer]) }
    }

    /// The memory of buffers of the list.
    fn memory(&self, first: usize, count: usize) -> impl Iterator<Item = VolatileSlice<'a>> {
        let buffers = self.buffers(first, count).iter();
        // SAFETY: `gather` had the buffers from `map`, which is borrowed for as long.
        buffers.map(|buffer| unsafe { VolatileSlice::new(buffer.iov_base.cast(), buffer.iov_len) })
    }
}

impl fmt::Display for Segments<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.broken {
            return f.write_str("its descriptors have no header and status byte, or lead nowhere");
        }
        let (kind, sector) = (u32_at(&self.header, 0), u64_at(&self.header, 8));
        write!(
            f,
            "type {kind} at sector {sector}, {} bytes from the driver and {} for it",
            self.out_bytes, self.in_bytes
        )
    }
}

fn ranged(
    op: Op,
    first_sector: u64,
    sectors: u64,
    limits: &Limits,
) -> Result<ParsedRequest, IoError> {
    let range = limits.check(op, first_sector, sectors)?;
    if range.len_bytes() == 0 {
        return Ok(done(1));
    }
    Ok(ParsedRequest::Start {
        op,
        range,
        buffers: 0,
        written_bytes: 1,
    })
}

fn done(written_bytes: u32) -> ParsedRequest {
    ParsedRequest::Answer {
        outcome: Ok(()),
        written_bytes,
    }
}

/// Adds a buffer after the `count` that are in the list from `first`; extends the last one when
/// the memory continues there.
#[inline]
fn add(
    list: &mut [MaybeUninit<Buffer>],
    first: usize,
    count: &mut usize,
    part: VolatileSlice<'_>,
) -> Option<()> {
    let more = buffer(part);
    if let Some(last) = count.checked_sub(1) {
        // SAFETY: entries below `first + count` were filled by earlier calls.
        let last = unsafe { list[first + last].assume_init_mut() };
        if last.iov_base.wrapping_byte_add(last.iov_len) == more.iov_base {
            last.iov_len = last.iov_len.checked_add(more.iov_len)?;
            return Some(());
        }
    }
    list.get_mut(first + *count)?.write(more);
    *count += 1;
    Some(())
}

/// Where memory is in this process, for the kernel and for the completion.
pub(super) fn memory_address(memory: VolatileSlice<'_>) -> *mut u8 {
    memory.ptr_guard_mut().as_ptr()
}

/// Memory as a storage takes it.
pub(super) fn buffer(memory: VolatileSlice<'_>) -> Buffer {
    Buffer {
        iov_base: memory_address(memory).cast(),
        iov_len: memory.len(),
    }
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
