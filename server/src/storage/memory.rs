//! A disk in anonymous memory: sparse, gone with the process.

use std::io;
use std::sync::Arc;

use io_uring::opcode;
use rustix::mm::{Advice, madvise};
use vm_memory::VolatileSlice;

use crate::engine::{Storage, StorageControl, StorageQueue};
use crate::io::{AnonymousMemory, Full, Owner, Ring, Slot, Token};
use crate::request::{IoError, Limits, Op, Outcome, Progress, Request, zero};

/// Released, and zeroed, at once: less than a millisecond's work. Other requests have their turn before the rest.
const RELEASE_BYTES: u64 = 8 << 20;
const ZERO_BYTES: u64 = 256 << 10;

/// A disk in memory. Pages that were never written, or were discarded, take no room.
#[derive(Debug)]
pub struct Memory {
    limits: Limits,
    mapping: Arc<Mapping>,
}

impl Memory {
    /// A disk of zeroes with these limits.
    ///
    /// # Errors
    ///
    /// When the address space (or the machine's overcommit policy) does not allow the size.
    pub fn new(limits: Limits) -> io::Result<Self> {
        let mapping = Arc::new(Mapping::new(limits.capacity.bytes())?);
        Ok(Self { limits, mapping })
    }
}

impl StorageControl for Memory {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Memory {
    type Queue = MemoryQueue;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _ring: &mut Ring, _slots: u32) -> io::Result<MemoryQueue> {
        Ok(MemoryQueue {
            mapping: Arc::clone(&self.mapping),
            abandoned: false,
        })
    }
}

/// One thread's access to a disk in memory. Data is copied at once; long ranges are released or zeroed in pieces, with
/// an empty operation on the ring between two of them.
#[derive(Debug)]
pub struct MemoryQueue {
    mapping: Arc<Mapping>,
    /// Requests end with the piece that is being done.
    abandoned: bool,
}

impl StorageQueue for MemoryQueue {
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        let most_bytes = match request.op() {
            Op::Read | Op::Write { .. } => return Progress::Done(self.copy(request)),
            Op::Flush => return Progress::Done(Ok(())),
            Op::Discard | Op::WriteZeroes { unmap: true, .. } => RELEASE_BYTES,
            Op::WriteZeroes { unmap: false, .. } => ZERO_BYTES,
        };
        let position = request.position_bytes();
        let to_multiple = most_bytes - position % most_bytes;
        let piece_bytes = request.remaining_bytes().min(to_multiple);
        let done = match most_bytes {
            RELEASE_BYTES => self.mapping.release(position, piece_bytes),
            _ => self.mapping.zero(position, piece_bytes),
        };
        request.advance(piece_bytes);
        if done.is_err() || request.remaining_bytes() == 0 {
            return Progress::Done(done);
        }
        if self.abandoned {
            return Progress::Done(Err(IoError::Io));
        }
        let token = Token {
            owner: Owner::Storage,
            kind: 0,
            index: slot,
        };
        // SAFETY: the operation refers to no memory.
        match unsafe { ring.push(opcode::Nop::new().build(), token) } {
            Ok(()) => Progress::Pending,
            Err(Full) => Progress::Full,
        }
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        _kind: u16,
        _result: i32,
    ) -> Progress {
        self.start(ring, slot, request)
    }

    fn abandon(&mut self) {
        self.abandoned = true;
    }
}

impl MemoryQueue {
    fn copy(&self, request: &Request) -> Outcome {
        let mut disk = self
            .mapping
            .range(request.offset_bytes(), request.len_bytes())?;
        for part in request.buffers().memory() {
            if request.op() == Op::Read {
                disk.copy_to_volatile_slice(part);
            } else {
                part.copy_to_volatile_slice(disk);
            }
            disk = disk.offset(part.len()).map_err(|_| IoError::Io)?;
        }
        Ok(())
    }
}

/// The memory of a disk, shared by the threads of this process. It is only copied: the order
/// of conflicting requests is the client's business, as on any disk.
#[derive(Debug)]
struct Mapping {
    memory: AnonymousMemory,
    page_bytes: u64,
}

impl Mapping {
    fn new(len_bytes: u64) -> io::Result<Self> {
        let len_bytes =
            usize::try_from(len_bytes).map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let memory = AnonymousMemory::new(len_bytes)?;
        // A hint: with small pages, random access spends its time in page-table walks. Sparsely used
        // memory takes up to 512 times as much.
        // SAFETY: leaves the contents as they are.
        let _ = unsafe { madvise(memory.as_ptr().cast(), len_bytes, Advice::LinuxHugepage) };
        Ok(Self {
            memory,
            page_bytes: rustix::param::page_size() as u64,
        })
    }

    /// A range. Doors have checked it; a mistake there must not become an access outside the disk.
    fn range(&self, offset_bytes: u64, len_bytes: u64) -> Result<VolatileSlice<'_>, IoError> {
        let (Ok(offset), Ok(len)) = (usize::try_from(offset_bytes), usize::try_from(len_bytes))
        else {
            return Err(IoError::Io);
        };
        let range = self.memory.slice().subslice(offset, len);
        range.map_err(|_| IoError::Io)
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Outcome {
        zero(self.range(offset_bytes, len_bytes)?);
        Ok(())
    }

    /// Zeroes a range and returns its whole pages to the system.
    fn release(&self, offset_bytes: u64, len_bytes: u64) -> Outcome {
        self.range(offset_bytes, len_bytes)?;
        let end = offset_bytes + len_bytes;
        let first_page = offset_bytes.next_multiple_of(self.page_bytes);
        let last_page = end / self.page_bytes * self.page_bytes;
        if first_page >= last_page {
            return self.zero(offset_bytes, len_bytes);
        }
        self.zero(offset_bytes, first_page - offset_bytes)?;
        self.zero(last_page, end - last_page)?;
        let pages = self.range(first_page, last_page - first_page)?;
        let at = pages.ptr_guard_mut().as_ptr().cast();
        // SAFETY: whole pages inside this mapping; afterwards they read as zeroes.
        unsafe { madvise(at, pages.len(), Advice::LinuxDontNeed) }
            .map_err(|error| IoError::from_errno(error.raw_os_error()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::request::small_disk;
    use crate::request::{Buffer, Buffers, Range};

    fn run(queue: &MemoryQueue, op: Op, offset_bytes: u64, bytes: &mut [u8]) -> Outcome {
        let half = bytes.len() / 2;
        let (a, b) = bytes.split_at_mut(half);
        let mut list = [a, b].map(|part| Buffer {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        });
        let range = Range::new(offset_bytes, 2 * half as u64);
        // SAFETY: `list` and `bytes` outlive the request, which is finished below.
        let buffers = unsafe { Buffers::from_list(&mut list) };
        let request = Request::new(op, range, buffers);
        let outcome = queue.copy(&request);
        request.finish();
        outcome
    }

    /// Releases or zeroes a range. Returns the outcome and in how many steps it was reached.
    fn clear(queue: &mut MemoryQueue, op: Op, range: Range) -> (Outcome, u64) {
        let mut ring = Ring::new(2).unwrap();
        let mut request = Request::new(op, range, Buffers::NONE);
        let mut steps = 1;
        let mut progress = queue.start(&mut ring, 0, &mut request);
        let outcome = loop {
            match progress {
                Progress::Done(outcome) => break outcome,
                Progress::Pending => {}
                Progress::Full => panic!("the ring is empty"),
            }
            assert!(ring.drain(Duration::from_secs(10), None));
            steps += 1;
            progress = queue.advance(&mut ring, 0, &mut request, 0, 0);
        };
        request.finish();
        (outcome, steps)
    }

    fn disk(len_bytes: u64) -> MemoryQueue {
        let memory = Memory::new(small_disk(len_bytes)).unwrap();
        memory.queue(&mut Ring::new(2).unwrap(), 1).unwrap()
    }

    #[test]
    fn what_was_written_is_read_back_and_the_rest_is_zero() {
        let disk = disk(1 << 20);
        let mut data: Vec<u8> = (0..=255).cycle().take(6000).collect();
        run(&disk, Op::Write { fua: false }, 1000, &mut data).unwrap();
        let mut back = vec![0xaa; 8000];
        run(&disk, Op::Read, 0, &mut back).unwrap();
        assert!(back[..1000].iter().all(|&b| b == 0));
        assert_eq!(back[1000..7000], data);
        assert!(back[7000..].iter().all(|&b| b == 0));
    }

    #[test]
    fn released_ranges_read_as_zeroes_at_any_alignment() {
        for (op, from, len) in [
            (Op::Discard, 512, 512),
            (Op::Discard, 512, 16 * 4096),
            (
                Op::WriteZeroes {
                    unmap: true,
                    fua: false,
                },
                4096,
                8192,
            ),
            (
                Op::WriteZeroes {
                    unmap: false,
                    fua: true,
                },
                1024,
                9216,
            ),
        ] {
            let mut disk = disk(1 << 20);
            let mut ones = vec![1; 1 << 20];
            run(&disk, Op::Write { fua: false }, 0, &mut ones).unwrap();
            let (outcome, steps) = clear(&mut disk, op, Range::new(from, len));
            assert_eq!((outcome, steps), (Ok(()), 1));
            let mut back = vec![0xaa; 1 << 20];
            run(&disk, Op::Read, 0, &mut back).unwrap();
            for (at, byte) in (0u64..).zip(&back) {
                let inside = (from..from + len).contains(&at);
                assert_eq!(*byte, u8::from(!inside), "{op:?} at {at}");
            }
        }
    }

    #[test]
    fn long_ranges_are_cleared_in_pieces() {
        let zeroes = |unmap| Op::WriteZeroes { unmap, fua: false };
        for (op, piece_bytes) in [
            (Op::Discard, RELEASE_BYTES),
            (zeroes(true), RELEASE_BYTES),
            (zeroes(false), ZERO_BYTES),
        ] {
            let mut disk = disk(5 * piece_bytes);
            let mut ones = [1; 1024];
            let middle = 2 * piece_bytes - 512;
            run(&disk, Op::Write { fua: false }, middle, &mut ones).unwrap();
            // From the middle of the first piece to that of the fourth.
            let range = Range::new(piece_bytes / 2, 3 * piece_bytes);
            assert_eq!(clear(&mut disk, op, range), (Ok(()), 4), "{op:?}");
            run(&disk, Op::Read, middle, &mut ones).unwrap();
            assert_eq!(ones, [0; 1024]);
            disk.abandon();
            let (outcome, steps) = clear(&mut disk, op, range);
            assert_eq!((outcome, steps), (Err(IoError::Io), 1), "ended early");
        }
    }

    #[test]
    fn sixteen_tebibytes_are_sparse() {
        let disk = disk(16 << 40);
        let mut data = vec![7; 4096];
        let last = (16 << 40) - 4096;
        run(&disk, Op::Write { fua: false }, last, &mut data).unwrap();
        let mut back = vec![0; 4096];
        run(&disk, Op::Read, last, &mut back).unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn a_range_that_no_door_should_have_let_through_is_an_error() {
        let disk = disk(1 << 20);
        let mut data = vec![7; 4096];
        assert_eq!(
            run(&disk, Op::Read, (1 << 20) - 2048, &mut data),
            Err(IoError::Io)
        );
        assert_eq!(run(&disk, Op::Read, u64::MAX, &mut data), Err(IoError::Io));
    }
}
