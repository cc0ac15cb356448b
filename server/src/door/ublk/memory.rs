//! The memory of one ublk queue: what the driver shows us and where the data goes.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use libublk::sys::{self, ublksrv_io_desc};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

use crate::engine::{MappedFile, SharedMemory, Sharing};
use crate::io::AnonymousMemory;
use crate::request::{Buffer, BufferLists, Buffers, IoError};

/// Which way data is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    /// What is written to the disk.
    FromRequest,
    /// What was read from it.
    ToRequest,
}

/// Bytes in a page of memory.
pub(super) fn page_bytes() -> u32 {
    // Every page size fits.
    u32::try_from(rustix::param::page_size()).unwrap_or(4096)
}

/// The descriptors of a queue's requests, one per tag: written by the driver before it completes
/// the fetch of that tag, read by us.
pub(super) struct Descriptors {
    first: *const ublksrv_io_desc,
    depth: u16,
    len_bytes: usize,
}

impl Descriptors {
    /// Maps the descriptors of `queue` of the device behind `char_device`.
    pub(super) fn map(char_device: &File, queue: u16, depth: u16) -> io::Result<Self> {
        let page = page_bytes() as usize;
        let bytes_for = |tags: usize| (tags * size_of::<ublksrv_io_desc>()).next_multiple_of(page);
        let len_bytes = bytes_for(usize::from(depth));
        // Queues lie as far apart as if they had the greatest depth.
        let stride = bytes_for(sys::UBLK_MAX_QUEUE_DEPTH as usize) as u64;
        let offset = u64::from(sys::UBLKSRV_CMD_BUF_OFFSET) + u64::from(queue) * stride;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let first = unsafe {
            mmap(
                ptr::null_mut(),
                len_bytes,
                ProtFlags::READ,
                MapFlags::SHARED | MapFlags::POPULATE,
                char_device,
                offset,
            )
        }?;
        Ok(Self {
            first: first.cast_const().cast(),
            depth,
            len_bytes,
        })
    }

    /// The descriptor of a tag whose fetch completed.
    pub(super) fn get(&self, tag: u16) -> ublksrv_io_desc {
        assert!(tag < self.depth, "tag {tag} of a queue of {}", self.depth);
        // SAFETY: the mapping holds `depth` descriptors and lives as long as `self`. The driver
        // wrote this one before it completed the fetch and leaves it alone until we commit.
        unsafe { self.first.add(usize::from(tag)).read_volatile() }
    }
}

impl Drop for Descriptors {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing that was read from it borrows from it.
        let _ = unsafe { munmap(self.first.cast_mut().cast(), self.len_bytes) };
    }
}

/// The data buffers of a queue, one per tag. Pages come into being when they are first used.
pub(super) struct IoBuffers {
    memory: ManuallyDrop<AnonymousMemory>,
    each_bytes: usize,
    depth: u16,
    /// One list of one entry per tag, for the requests to borrow.
    lists: ManuallyDrop<BufferLists>,
    /// Where the storage hands the memory on. It ends before the memory does.
    shared: ManuallyDrop<Option<SharedMemory>>,
    leaked: bool,
}

impl IoBuffers {
    /// `depth` buffers of `each_bytes`, a multiple of the page size, for a storage that may hand them on.
    pub(super) fn new(
        depth: u16,
        each_bytes: u32,
        sharing: Option<&dyn Sharing>,
    ) -> io::Result<Self> {
        let each_bytes = each_bytes as usize;
        let len_bytes = each_bytes * usize::from(depth);
        let (memory, shared) = match sharing {
            None => (AnonymousMemory::new(len_bytes)?, None),
            Some(sharing) => {
                let (memory, file) = AnonymousMemory::shareable("ublkup-buffers", len_bytes)?;
                let shared = sharing.share(MappedFile {
                    file: file.as_fd(),
                    offset_bytes: 0,
                    address: memory.as_ptr().addr(),
                    len_bytes: len_bytes as u64,
                })?;
                (memory, Some(shared))
            }
        };
        // Small requests must not cost a huge page each. Kernels without huge pages refuse the
        // advice, and need none.
        // SAFETY: the range is the new mapping; the advice changes no content.
        let _ = unsafe { madvise(memory.as_ptr().cast(), len_bytes, Advice::LinuxNoHugepage) };
        Ok(Self {
            memory: ManuallyDrop::new(memory),
            each_bytes,
            depth,
            lists: ManuallyDrop::new(BufferLists::new(depth.into(), 1)),
            shared: ManuallyDrop::new(shared),
            leaked: false,
        })
    }

    /// Never frees the memory: the driver keeps commands that point to it.
    pub(super) fn leak(&mut self) {
        self.leaked = true;
    }

    /// Where the driver finds the buffer of a tag.
    pub(super) fn address(&self, tag: u16) -> u64 {
        self.start(tag) as u64
    }

    /// The first `len_bytes` of the buffer of a tag, for a request.
    ///
    /// # Safety
    ///
    /// The request must be finished before the next one of its tag is made, and before `self` goes.
    pub(super) unsafe fn lend(&self, tag: u16, len_bytes: usize) -> Buffers {
        assert!(len_bytes <= self.each_bytes, "longer than its buffer");
        let entry = Buffer {
            iov_base: self.start(tag).cast(),
            iov_len: len_bytes,
        };
        // SAFETY: no other request uses the list of the tag, as the caller promises; its only entry is filled.
        unsafe {
            self.lists.fill(tag.into())[0].write(entry);
            self.lists.lend(tag.into(), 1)
        }
    }

    /// Copies between the pages of a tag's request and its buffer, through the character device.
    pub(super) fn copy(
        &self,
        char_device: &File,
        queue: u16,
        tag: u16,
        len_bytes: usize,
        direction: Direction,
    ) -> Result<(), IoError> {
        assert!(len_bytes <= self.each_bytes, "longer than its buffer");
        let first = u64::from(sys::UBLKSRV_IO_BUF_OFFSET)
            + (u64::from(queue) << sys::UBLK_QID_OFF)
            + (u64::from(tag) << sys::UBLK_TAG_OFF);
        let buffer = self.start(tag);
        let mut done = 0;
        while done < len_bytes {
            let (fd, rest, left) = (
                char_device.as_raw_fd(),
                buffer.wrapping_add(done),
                len_bytes - done,
            );
            // The last byte of a buffer of the driver is below 2^63.
            let at = (first + done as u64).cast_signed();
            // SAFETY: the buffer is mapped as long as `self`, and no request of this process uses it before its start and
            // after its end. It is no slice: where it is shared, another process can write to it meanwhile.
            let moved = unsafe {
                match direction {
                    Direction::FromRequest => libc::pread(fd, rest.cast(), left, at),
                    Direction::ToRequest => libc::pwrite(fd, rest.cast(), left, at),
                }
            };
            match usize::try_from(moved) {
                Ok(0) => return Err(IoError::Io),
                Ok(moved) => done += moved,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => {
                        return Err(IoError::from_errno(
                            error.raw_os_error().unwrap_or(libc::EIO),
                        ));
                    }
                },
            }
        }
        Ok(())
    }

    fn start(&self, tag: u16) -> *mut u8 {
        assert!(tag < self.depth, "tag {tag} of a queue of {}", self.depth);
        let offset = usize::from(tag) * self.each_bytes;
        self.memory.as_ptr().wrapping_add(offset)
    }
}

impl Drop for IoBuffers {
    fn drop(&mut self) {
        if self.leaked {
            // The driver may still write here. The memory stays.
            return;
        }
        // SAFETY: none is used after this. The queue thread drained its ring before it dropped the door, and it
        // does not drop the door when that failed.
        unsafe {
            ManuallyDrop::drop(&mut self.lists);
            ManuallyDrop::drop(&mut self.shared);
            ManuallyDrop::drop(&mut self.memory);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::{pread, pwrite};

    use super::*;

    #[test]
    fn buffers_of_different_tags_do_not_overlap() {
        let each = page_bytes() * 2;
        let buffers = IoBuffers::new(4, each, None).unwrap();
        for tag in 0..4 {
            // SAFETY: nothing else uses the tag or its buffer.
            let lent = unsafe { buffers.lend(tag, each as usize) };
            let buffer = lent.list()[0];
            assert_eq!(buffer.iov_base as usize % page_bytes() as usize, 0);
            let value = tag.to_le_bytes()[0] + 1;
            // SAFETY: as above.
            unsafe { ptr::write_bytes(buffer.iov_base.cast::<u8>(), value, buffer.iov_len) };
        }
        for tag in 0..4u16 {
            let base = buffers.address(tag) as *const u8;
            for at in [0, each as usize - 1] {
                // SAFETY: within the buffer of the tag, which was written above.
                assert_eq!(unsafe { base.add(at).read() }, tag.to_le_bytes()[0] + 1);
            }
        }
    }

    #[test]
    fn the_server_copies_to_and_from_the_place_of_a_tag() {
        let each = page_bytes();
        let buffers = IoBuffers::new(4, each, None).unwrap();
        // A file with room for the pages of queue 1, tag 2, which begin here.
        let at = 0x8000_0000u64 + (1 << 41) + (2 << 25);
        let device: File = rustix::fs::memfd_create("device", rustix::fs::MemfdFlags::CLOEXEC)
            .unwrap()
            .into();
        pwrite(&device, b"what is written", at).unwrap();
        let (base, len) = (buffers.address(2) as *mut u8, 15);
        buffers
            .copy(&device, 1, 2, 15, Direction::FromRequest)
            .unwrap();
        // SAFETY: memory of `buffers`, which nothing writes to meanwhile.
        let got = unsafe { std::slice::from_raw_parts(base, len) };
        assert_eq!(got, b"what is written");
        // Behind the end of the file there is nothing to be had: never half a request.
        let short = buffers.copy(&device, 1, 2, 16, Direction::FromRequest);
        assert_eq!(short, Err(IoError::Io));
        // SAFETY: as above.
        unsafe { base.copy_from(b"what is read   ".as_ptr(), 15) };
        buffers
            .copy(&device, 1, 2, 15, Direction::ToRequest)
            .unwrap();
        let mut there = [0; 15];
        pread(&device, &mut there, at).unwrap();
        assert_eq!(&there, b"what is read   ");
    }

    #[test]
    fn a_storage_that_hands_memory_on_gets_the_buffers_until_they_go() {
        use std::sync::{Arc, Mutex};

        /// The address and length of what it has, and the file.
        type Seen = Arc<Mutex<Option<(usize, u64, File)>>>;
        struct Recorder(Seen);
        struct Hold(Seen);
        impl Drop for Hold {
            fn drop(&mut self) {
                self.0.lock().unwrap().take();
            }
        }
        impl Sharing for Recorder {
            fn share(&self, memory: MappedFile<'_>) -> io::Result<SharedMemory> {
                let file = memory.file.try_clone_to_owned()?.into();
                *self.0.lock().unwrap() = Some((memory.address, memory.len_bytes, file));
                Ok(SharedMemory::new(Hold(Arc::clone(&self.0))))
            }
        }

        let seen = Seen::default();
        let each = page_bytes();
        let buffers = IoBuffers::new(4, each, Some(&Recorder(Arc::clone(&seen)))).unwrap();
        // SAFETY: memory of `buffers`, which nothing else uses.
        unsafe { (buffers.address(3) as *mut u8).write_volatile(7) };
        {
            let seen = seen.lock().unwrap();
            let (address, len_bytes, file) = seen.as_ref().unwrap();
            assert_eq!(*address as u64, buffers.address(0));
            assert_eq!(*len_bytes, 4 * u64::from(each));
            let mut byte = [0];
            pread(file, &mut byte, 3 * u64::from(each)).unwrap();
            assert_eq!(byte, [7], "another process that maps it sees the data");
        }
        drop(buffers);
        assert!(seen.lock().unwrap().is_none());
    }

    #[test]
    #[should_panic(expected = "longer than its buffer")]
    fn a_list_does_not_reach_into_the_next_buffer() {
        let buffers = IoBuffers::new(2, page_bytes(), None).unwrap();
        // SAFETY: nothing else uses the tag.
        unsafe { buffers.lend(0, page_bytes() as usize + 1) };
    }
}
