//! What the rings of this process may do (`IORING_REGISTER_RESTRICTIONS`, io_uring_register(2)).
//!
//! io_uring goes around seccomp: a filter that forbids openat(2) knows nothing of `IORING_OP_OPENAT`. So each ring is
//! made disabled, told the operations that a server uses, and then enabled; from there on nothing can widen them.
//!
//! A ring is restricted by the thread that makes it (Linux 5.10). Code that has taken over the process can make
//! another one, unless the thread itself is restricted ([`ThreadRestrictions`], Linux 7.0).

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use io_uring::register::Restriction;
use io_uring::{Builder, IoUring, cqueue, opcode, squeue};

/// Operations on descriptors that are open already, and on what is under way. `Nop` and `Timeout` reach nothing;
/// fault injection and tests use them.
const OPERATIONS: [u8; 13] = [
    opcode::Nop::CODE,
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::ReadFixed::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Timeout::CODE,
    // Of 80 bytes as well.
    opcode::UringCmd16::CODE,
];

/// From `enum io_uring_register_op`, include/uapi/linux/io_uring.h: tables of files (3, 6, 13) and buffers (15), enabling
/// a ring (12), the numbers of rings among those of a thread (20, 21), and last what not every kernel knows that knows
/// the others: cancelling and waiting (24, Linux 6.0).
const REGISTRATIONS: [u8; 8] = [3, 6, 12, 13, 15, 20, 21, 24];

const REGISTER_RESTRICTIONS: libc::c_uint = 11;

/// `IOSQE_FIXED_FILE` and `IOSQE_ASYNC`.
const FLAGS: u8 = 1 << 0 | 1 << 4;

static WANTED: AtomicBool = AtomicBool::new(true);

/// A ring could not be restricted.
static LACKING: AtomicBool = AtomicBool::new(false);

/// Leaves the rings that are made from here on as the kernel makes them.
pub fn leave_rings_unrestricted() {
    WANTED.store(false, Ordering::Relaxed);
}

/// Whether all rings were restricted that were to be.
#[must_use]
pub fn are_rings_restricted() -> bool {
    !LACKING.load(Ordering::Relaxed)
}

/// Makes a ring, restricted if that is wanted and the kernel can.
///
/// # Errors
///
/// What the kernel says to such a ring.
pub fn build_restricted<S, C>(
    builder: &mut Builder<S, C>,
    entries: u32,
) -> io::Result<IoUring<S, C>>
where
    S: squeue::EntryMarker,
    C: cqueue::EntryMarker,
{
    if !WANTED.load(Ordering::Relaxed) {
        return builder.build(entries);
    }
    let uring = builder.setup_r_disabled().build(entries)?;
    let submitter = uring.submitter();
    let restrict = |list: &mut [Restriction]| submitter.register_restrictions(list);
    let mut list = restrictions();
    let all_but_the_last = list.len() - 1;
    let restricted = restrict(&mut list).or_else(|error| match error.raw_os_error() {
        Some(libc::EINVAL) => restrict(&mut list[..all_but_the_last]),
        // It has those of the thread, which are the same.
        Some(libc::EACCES | libc::EBUSY) => Ok(()),
        _ => Err(error),
    });
    if restricted.is_err() {
        LACKING.store(true, Ordering::Relaxed);
    }
    submitter.register_enable_rings()?;
    Ok(uring)
}

const COUNT: usize = OPERATIONS.len() + REGISTRATIONS.len() + 1;

/// The newest, which a kernel may not know, last.
fn restrictions() -> [Restriction; COUNT] {
    std::array::from_fn(|index| match index.checked_sub(OPERATIONS.len()) {
        None => Restriction::sqe_op(OPERATIONS[index]),
        Some(0) => Restriction::sqe_flags_allowed(FLAGS),
        Some(index) => Restriction::register_op(REGISTRATIONS[index - 1]),
    })
}

/// The same restrictions for all rings that a thread, and the threads that it starts, will make (Linux 7.0).
#[repr(C)]
pub struct ThreadRestrictions {
    flags: u16,
    count: u16,
    reserved: [u32; 3],
    list: [Restriction; COUNT],
}

impl Default for ThreadRestrictions {
    fn default() -> Self {
        const { assert!(size_of::<Restriction>() == 16) };
        Self {
            flags: 0,
            count: u16::try_from(COUNT).unwrap_or_default(),
            reserved: [0; 3],
            list: restrictions(),
        }
    }
}

impl ThreadRestrictions {
    /// Restricts the calling thread, for good. It must have given up new privileges. May be called in a signal
    /// handler.
    ///
    /// # Errors
    ///
    /// `EINVAL` or `EBADF` on kernels that cannot.
    pub fn apply(&self) -> io::Result<()> {
        let no_ring: libc::c_int = -1;
        // SAFETY: the kernel reads the header and as many restrictions as it says, all of them in `self`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                no_ring,
                REGISTER_RESTRICTIONS,
                std::ptr::from_ref(self),
                1,
            )
        };
        if result == 0 {
            return Ok(());
        }
        match io::Error::last_os_error() {
            // It was started by a thread that is restricted.
            error if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            error => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use io_uring::types;

    use super::*;

    fn result_of(uring: &mut IoUring, sqe: squeue::Entry) -> i32 {
        // SAFETY: what the entries of these tests point to is static.
        unsafe { uring.submission().push(&sqe) }.unwrap();
        uring.submit_and_wait(1).unwrap();
        uring.completion().next().unwrap().result()
    }

    #[test]
    fn a_restricted_ring_opens_connects_and_registers_nothing_else() {
        let mut uring = build_restricted(&mut IoUring::builder(), 4).unwrap();
        let open = || opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
        let socket = || opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        assert_eq!(result_of(&mut uring, open()), -libc::EACCES);
        assert_eq!(result_of(&mut uring, socket()), -libc::EACCES);
        assert_eq!(result_of(&mut uring, opcode::Nop::new().build()), 0);
        let linked = opcode::Nop::new().build().flags(squeue::Flags::IO_LINK);
        assert_eq!(result_of(&mut uring, linked), -libc::EACCES);
        let registered = uring.submitter().register_personality();
        assert_eq!(registered.unwrap_err().raw_os_error(), Some(libc::EACCES));

        let mut uring = IoUring::new(4).unwrap();
        let opened = result_of(&mut uring, open());
        assert!(opened >= 0, "{opened}");
        assert_eq!(
            result_of(&mut uring, opcode::Close::new(types::Fd(opened)).build()),
            0
        );
    }

    #[test]
    fn a_restricted_thread_makes_no_other_rings() {
        // Its own thread: there is no way back.
        let made = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            match ThreadRestrictions::default().apply() {
                Err(error) => {
                    let unknown = matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EBADF));
                    assert!(unknown, "{error}");
                    None
                }
                Ok(()) => {
                    ThreadRestrictions::default().apply().unwrap();
                    let restricted = build_restricted(&mut IoUring::builder(), 4);
                    Some((IoUring::new(4), restricted))
                }
            }
        });
        let Some((free, restricted)) = made.join().unwrap() else {
            println!("the kernel cannot");
            return;
        };
        for mut uring in [free.unwrap(), restricted.unwrap()] {
            let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build();
            assert_eq!(result_of(&mut uring, open), -libc::EACCES);
            assert_eq!(result_of(&mut uring, opcode::Nop::new().build()), 0);
        }
    }
}
