//! Entering the kernel for a ring that the thread has registered with itself.
//!
//! In a process with several threads each system call that names a descriptor takes a reference to what
//! is behind it and gives it back: a quarter of what entering an io_uring takes when there is nothing to
//! do. A thread may register its rings once and name them by number (`IORING_REGISTER_RING_FDS`, Linux
//! 5.18; io_uring_register(2)). The package io-uring knows that only for a `Submitter` that lives as long
//! as the ring that it borrows.

use std::io;
use std::marker::PhantomData;
use std::os::fd::RawFd;

/// From `enum io_uring_register_op` and the flags of io_uring_enter(2), include/uapi/linux/io_uring.h.
const REGISTER_RING_FDS: libc::c_uint = 20;
const UNREGISTER_RING_FDS: libc::c_uint = 21;
const ENTER_GETEVENTS: libc::c_uint = 1;
const ENTER_REGISTERED_RING: libc::c_uint = 1 << 4;

/// `struct io_uring_rsrc_update`.
#[repr(C)]
struct Update {
    offset: u32,
    resv: u32,
    data: u64,
}

/// How a thread enters the kernel for one ring. Stays with the thread: another one has other numbers, and
/// would give back one of its own.
#[derive(Debug)]
pub(super) struct Entrance {
    ring: RawFd,
    /// The ring's number among those of the thread, if the kernel gave it one.
    number: Option<u32>,
    stays: PhantomData<*const ()>,
}

impl Entrance {
    /// For a ring of the calling thread, which must be the only one to enter it.
    pub(super) fn new(ring: RawFd) -> Self {
        let mut update = Update {
            // The kernel chooses.
            offset: u32::MAX,
            resv: 0,
            // A descriptor is not negative.
            data: u64::from(ring.cast_unsigned()),
        };
        let registered = register(ring, REGISTER_RING_FDS, &mut update);
        Self {
            ring,
            number: (registered == 1).then_some(update.offset),
            stays: PhantomData,
        }
    }

    /// Submits `queued` entries and waits for `want` completions; makes those that the kernel holds back.
    ///
    /// # Errors
    ///
    /// What io_uring_enter(2) answers.
    pub(super) fn enter(&self, queued: u32, want: u32) -> io::Result<usize> {
        let (ring, flag) = match self.number {
            Some(number) => (number, ENTER_REGISTERED_RING),
            None => (self.ring.cast_unsigned(), 0),
        };
        let (flags, no_mask) = (ENTER_GETEVENTS | flag, std::ptr::null::<libc::sigset_t>());
        let number = libc::SYS_io_uring_enter;
        // SAFETY: without a mask the call reads no memory of ours but the ring's, which is the kernel's.
        let result = unsafe { libc::syscall(number, ring, queued, want, flags, no_mask, 0usize) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl Drop for Entrance {
    /// A ring that a thread has registered lives until the thread ends.
    fn drop(&mut self) {
        let Some(offset) = self.number else {
            return;
        };
        let mut update = Update {
            offset,
            resv: 0,
            data: 0,
        };
        register(self.ring, UNREGISTER_RING_FDS, &mut update);
    }
}

fn register(ring: RawFd, what: libc::c_uint, update: &mut Update) -> libc::c_long {
    let number = libc::SYS_io_uring_register;
    // SAFETY: the kernel reads and writes the one update that it is told of.
    unsafe { libc::syscall(number, ring, what, std::ptr::from_mut(update), 1) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use io_uring::{IoUring, opcode};

    use super::*;

    fn do_nothing(uring: &mut IoUring, entrance: &Entrance) {
        // SAFETY: a NOP points to nothing.
        unsafe { uring.submission().push(&opcode::Nop::new().build()) }.unwrap();
        assert_eq!(entrance.enter(1, 1).unwrap(), 1);
        assert_eq!(uring.completion().count(), 1);
    }

    #[test]
    fn a_ring_is_entered_by_its_number_and_without_one() {
        let mut uring = IoUring::new(2).unwrap();
        let mut entrance = Entrance::new(uring.as_raw_fd());
        do_nothing(&mut uring, &entrance);
        let number = entrance.number.take();
        do_nothing(&mut uring, &entrance);
        entrance.number = number;
        // The number alone will do.
        entrance.ring = -1;
        if number.is_some() {
            do_nothing(&mut uring, &entrance);
        }
        entrance.ring = uring.as_raw_fd();
    }

    #[test]
    fn an_error_is_one() {
        let uring = IoUring::new(2).unwrap();
        let mut entrance = Entrance::new(uring.as_raw_fd());
        let number = entrance.number.take();
        entrance.ring = -1;
        let error = entrance.enter(0, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        (entrance.ring, entrance.number) = (uring.as_raw_fd(), number);
    }

    /// As many as a thread has numbers for, many times: none is left.
    #[test]
    fn a_number_is_given_back() {
        let first = IoUring::new(2).unwrap();
        let has_numbers = Entrance::new(first.as_raw_fd()).number.is_some();
        for _ in 0..100 {
            let uring = IoUring::new(2).unwrap();
            let entrance = Entrance::new(uring.as_raw_fd());
            assert_eq!(entrance.number.is_some(), has_numbers);
        }
    }
}
