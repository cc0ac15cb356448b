//! A client may cut its memory file short after we mapped it; touching it then raises SIGBUS.
//!
//! One handler for the process looks the address up in a lock-free table of guest mappings. A hit
//! puts anonymous zero pages over the **whole** mapping, so that the interrupted access goes on
//! harmlessly, and marks the mapping as poisoned; its session is ended by the thread that notices.
//! Every other SIGBUS goes where it went before.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Guest mappings that can exist at once in the process.
const ENTRIES: usize = 16 * 1024;

struct Entry {
    /// First byte; 0 when the entry is free, 1 while it is being filled.
    start: AtomicUsize,
    end: AtomicUsize,
    poisoned: AtomicBool,
}

const FREE: usize = 0;
const CLAIMED: usize = 1;

static TABLE: [Entry; ENTRIES] = [const {
    Entry {
        start: AtomicUsize::new(FREE),
        end: AtomicUsize::new(0),
        poisoned: AtomicBool::new(false),
    }
}; ENTRIES];

/// Entries at and beyond this index were never used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// How many mappings were poisoned so far.
static POISONINGS: AtomicU64 = AtomicU64::new(0);

/// What SIGBUS did before us.
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

/// A mapping that is watched for as long as this lives. Drop it before the memory is unmapped.
#[derive(Debug)]
pub(super) struct Watch {
    index: usize,
}

impl Watch {
    /// Watches `len_bytes` mapped bytes from `start`.
    ///
    /// # Errors
    ///
    /// When the handler cannot be installed or too many mappings are watched already.
    pub(super) fn new(start: *mut u8, len_bytes: usize) -> io::Result<Self> {
        install()?;
        for (index, entry) in TABLE.iter().enumerate() {
            let claim =
                entry
                    .start
                    .compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed);
            if claim.is_ok() {
                entry.poisoned.store(false, Ordering::Relaxed);
                entry
                    .end
                    .store(start as usize + len_bytes, Ordering::Relaxed);
                USED.fetch_max(index + 1, Ordering::Relaxed);
                entry.start.store(start as usize, Ordering::Release);
                return Ok(Self { index });
            }
        }
        Err(io::Error::other("too many guest memory regions"))
    }

    /// Whether the client took memory away from under the mapping.
    pub(super) fn is_poisoned(&self) -> bool {
        TABLE[self.index].poisoned.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        TABLE[self.index].start.store(FREE, Ordering::Release);
    }
}

/// How many mappings were poisoned so far: a cheap test whether a check of the maps is due.
pub(super) fn poisonings() -> u64 {
    POISONINGS.load(Ordering::Relaxed)
}

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let errno = *INSTALLED.get_or_init(|| {
        let mut previous = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: an all-zero sigaction is a valid one.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handle as *const () as usize;
        // On the thread's own signal stack, so that the overflow check of the runtime still works.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: asks only for the current action.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), previous.as_mut_ptr()) } != 0 {
            return io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EINVAL);
        }
        // SAFETY: the call above filled it.
        let _ = PREVIOUS.set(unsafe { previous.assume_init() });
        // SAFETY: the handler is async-signal-safe: atomics and mmap only.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) } != 0 {
            return io::Error::last_os_error()
                .raw_os_error()
                .unwrap_or(libc::EINVAL);
        }
        0
    });
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler; the address is only read
    // for faults (positive codes).
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code > 0 && cover(address) {
        return;
    }
    // Not ours: put back what was there and let the access fault again.
    if let Some(previous) = PREVIOUS.get() {
        // SAFETY: restores an action that sigaction gave us.
        unsafe { libc::sigaction(libc::SIGBUS, previous, ptr::null_mut()) };
        if code <= 0 {
            // Sent by a process, not caused by an access: it does not come again by itself.
            // SAFETY: raise is async-signal-safe.
            unsafe { libc::raise(libc::SIGBUS) };
        }
    }
}

/// Puts zero pages over the mapping that holds `address`, if there is one.
fn cover(address: usize) -> bool {
    for entry in &TABLE[..USED.load(Ordering::Relaxed)] {
        let start = entry.start.load(Ordering::Acquire);
        let end = entry.end.load(Ordering::Acquire);
        // Another mapping may have got the entry in between: that end does not belong to this start.
        let same = entry.start.load(Ordering::Relaxed) == start;
        if !same || start <= CLAIMED || address < start || address >= end {
            continue;
        }
        // SAFETY: errno is the thread's own; it must look untouched to the interrupted code.
        let errno = unsafe { *libc::__errno_location() };
        // SAFETY: the faulting access proves that the mapping which holds the address is alive,
        // and its watch covers exactly that mapping; replacing the pages is what we are here for.
        // The owner unmaps the range later as if nothing had happened.
        let covered = unsafe {
            libc::mmap(
                start as *mut libc::c_void,
                end - start,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if covered == libc::MAP_FAILED {
            return false;
        }
        entry.poisoned.store(true, Ordering::Release);
        POISONINGS.fetch_add(1, Ordering::Release);
        return true;
    }
    false
}
