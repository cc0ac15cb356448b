//! Filters for system calls: a process that makes one that is forbidden gets an error, or is killed.

use std::io;

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter};

fn op(code: u32, jt: u8, k: u32) -> sock_filter {
    sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf: 0,
        k,
    }
}

/// Installs a filter for this process with these answers to two system calls, and to all others
/// (`SECCOMP_RET_*`). Allocates nothing: it may be called between fork and exec.
///
/// # Errors
/// The kernel has no filters.
pub fn filter([one, two]: [u32; 2], those: u32, others: u32) -> io::Result<()> {
    let mut filter = [
        // The number of the system call is the first word.
        op(BPF_LD | BPF_W | BPF_ABS, 0, 0),
        op(BPF_JMP | BPF_JEQ | BPF_K, 2, one),
        op(BPF_JMP | BPF_JEQ | BPF_K, 1, two),
        op(BPF_RET | BPF_K, 0, others),
        op(BPF_RET | BPF_K, 0, those),
    ];
    let program = libc::sock_fprog {
        len: 5,
        filter: filter.as_mut_ptr(),
    };
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: `program` and the filter it points to live until the calls return.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) == 0
    };
    done.then_some(()).ok_or_else(io::Error::last_os_error)
}
