//! Processes that write out memory for others may not wait for memory to be written out.

use std::io;

/// `PR_SET_IO_FLUSHER` (Linux 5.6, `linux/prctl.h`).
const SET_IO_FLUSHER: libc::c_int = 57;

/// Declares this thread, and those that it will start, part of the way that writes take to the storage: the kernel does
/// not make them wait for pages that only they can write, and throttles their writes by their own device only.
///
/// # Errors
///
/// Without `CAP_SYS_RESOURCE`.
pub fn declare() -> io::Result<()> {
    // SAFETY: the call has no pointers.
    match unsafe { libc::prctl(SET_IO_FLUSHER, 1, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
