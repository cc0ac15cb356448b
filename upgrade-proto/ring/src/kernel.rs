//! The kernel's ring: two system calls of the out-of-tree ringbuffer series, made only if the caller of the
//! library asks for them ([`crate::Options::kernel`]).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::memory::{ControlPage, Memory, Pieces, Role, control};

/// `ringbuffer(fd, args, usize)`: returns a descriptor to map the ring by.
const SYS_RINGBUFFER: libc::c_long = 473;
/// `ringbuffer_wakeup(fd, side, flags)`.
const SYS_RINGBUFFER_WAKEUP: libc::c_long = 474;

/// `struct ringbuffer_args`, first version.
#[repr(C)]
#[derive(Debug, Default)]
struct Args {
    size: u64,
    side: u32,
    flags: u32,
    resv: [u64; 2],
}

const _: () = assert!(size_of::<Args>() == 32, "as long as the first version");

/// The side of a pipe that this end is, in the kernel's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Side {
    Read = 0,
    Write = 1,
}

impl Side {
    /// The bit of `control::CLOSED` for the other side.
    #[inline]
    pub(crate) fn peer_bit(self) -> u32 {
        match self {
            Self::Read => control::NO_WRITER,
            Self::Write => control::NO_READER,
        }
    }

    /// The bit of `control::WAITING` for the other side.
    #[inline]
    pub(crate) fn sleeper_bit(self) -> u32 {
        match self {
            Self::Read => control::SLEEPS_WRITE,
            Self::Write => control::SLEEPS_READ,
        }
    }

    /// Wakes all sleepers on the other side, in the kernel and in futexes.
    pub(crate) fn wake_peer(self, pipe: BorrowedFd<'_>) {
        // An error would mean that the ring is dead, which the control page says, too.
        // SAFETY: the call accesses no memory of this process.
        let _woken =
            unsafe { libc::syscall(SYS_RINGBUFFER_WAKEUP, pipe.as_raw_fd(), self as u32, 0_u32) };
    }
}

impl From<Role> for Side {
    fn from(role: Role) -> Self {
        match role {
            Role::Producer => Self::Write,
            Role::Consumer => Self::Read,
        }
    }
}

/// A ring that this end has asked for. It uses read(2) and write(2) until it maps its side.
#[derive(Debug)]
pub(crate) struct PendingRing {
    ring: OwnedFd,
    control: ControlPage,
    role: Role,
    size: u32,
}

impl PendingRing {
    /// [`control::PENDING`] until all who have the pipe open have asked.
    pub(crate) fn state(&self) -> u32 {
        self.control.word(control::STATE)
    }

    /// Maps this side. EBUSY: another process has it mapped, or is just reading or writing.
    pub(crate) fn map(&self) -> Result<Memory, Errno> {
        let page = rustix::param::page_size() as u64;
        let pieces = Pieces {
            main: self.ring.as_fd(),
            consumer: Some((self.ring.as_fd(), 2 * page)),
            own: false,
        };
        // The mapping outlives the descriptor.
        Memory::map(self.role, self.size, &pieces)
    }
}

/// Asks for the ring of a pipe. ENOSYS, EOPNOTSUPP, EPERM, EACCES: there is none, or not for this process.
pub(crate) fn ask(pipe: BorrowedFd<'_>, role: Role, size: u64) -> Result<PendingRing, Errno> {
    let mut args = Args {
        size,
        side: Side::from(role) as u32,
        ..Args::default()
    };
    // SAFETY: the kernel reads and writes `args`, within the size that is passed, during the call.
    let answer = unsafe {
        libc::syscall(
            SYS_RINGBUFFER,
            pipe.as_raw_fd(),
            &raw mut args,
            size_of::<Args>(),
        )
    };
    if answer < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    let number = i32::try_from(answer).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just opened it for the caller.
    let ring = unsafe { OwnedFd::from_raw_fd(number) };
    // What is mapped keeps its size, which another program may have made larger since, or fixed when it was smaller:
    // then read(2) and write(2) use the ring.
    let control = ControlPage::map(ring.as_fd())?;
    let size = control.word(control::SIZE);
    if !Memory::is_size(size.into()) {
        return Err(Errno::NOBUFS);
    }
    let page = rustix::param::page_size() as u64;
    let says = |word, value: u64| u64::from(control.word(word)) == value;
    let as_expected = says(control::VERSION, control::VERSION_1.into())
        && says(control::PRODUCER_OFFSET, page)
        && says(control::CONSUMER_OFFSET, 2 * page)
        && says(control::DATA_OFFSET, 3 * page)
        && says(control::MMAP_SIZE, 3 * page + u64::from(size));
    let ring = PendingRing {
        ring,
        control,
        role,
        size,
    };
    as_expected.then_some(ring).ok_or(Errno::PROTO)
}
