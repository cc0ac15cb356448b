//! Confining threads that run already.
//!
//! The kernel keeps Landlock's rules, restrictions of rings, capabilities and namespaces for each thread, and only the thread itself
//! can change them (Landlock can for all, from Linux 7.0). So each thread gets a signal whose handler does it, as the
//! C library does for setuid(2).

use std::fs;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, gettid, set_capabilities, set_no_new_privs,
};

use super::files::Files;
use super::mounts::Namespace;
use crate::io::ThreadRestrictions;

/// How long a thread may take to get the signal. All of them sleep where a signal wakes them.
const LIMIT: Duration = Duration::from_secs(10);

/// How often it is looked whether it has it, first by yielding the processor, then by sleeping.
const YIELDS: u32 = 100;
const INTERVAL: Duration = Duration::from_micros(50);

/// What is done to each thread.
pub(super) enum Change {
    Namespace(Namespace),
    Confinement(Box<Confinement>),
}

impl Change {
    /// Makes system calls and nothing else: it runs in a signal handler.
    fn apply(&self) -> Lacks {
        match self {
            Self::Namespace(namespace) => match namespace.enter() {
                Ok(()) => Lacks::default(),
                Err(_) => Lacks(Lack::Namespace as u32),
            },
            Self::Confinement(confinement) => confinement.apply(),
        }
    }
}

/// What is taken away from each thread.
pub(super) struct Confinement {
    pub(super) files: Option<Files>,
    pub(super) rings: ThreadRestrictions,
    /// What is left of the capabilities.
    pub(super) capabilities: CapabilitySet,
}

/// What could not be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    Files = 1,
    Rings = 2,
    Capabilities = 4,
    Namespace = 8,
}

/// A set of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Lacks(u32);

impl Lacks {
    pub(super) fn contains(self, lack: Lack) -> bool {
        self.0 & lack as u32 != 0
    }
}

impl Confinement {
    /// Confines the calling thread. Makes system calls and nothing else: it runs in a signal handler.
    pub(super) fn apply(&self) -> Lacks {
        // It never fails. Without it nothing else is possible.
        let _ = set_no_new_privs(true);
        let mut lacks = 0;
        if let Some(files) = &self.files
            && files.apply().is_err()
        {
            lacks |= Lack::Files as u32;
        }
        if self.rings.apply().is_err() {
            lacks |= Lack::Rings as u32;
        }
        let kept = capabilities(None).and_then(|now| {
            let kept = CapabilitySets {
                effective: now.effective & self.capabilities,
                permitted: now.permitted & self.capabilities,
                inheritable: CapabilitySet::empty(),
            };
            set_capabilities(None, kept)
        });
        if kept.is_err() {
            lacks |= Lack::Capabilities as u32;
        }
        Lacks(lacks)
    }
}

static CHANGE: AtomicPtr<Change> = AtomicPtr::new(ptr::null_mut());
static LACKS: AtomicU32 = AtomicU32::new(0);
/// The thread that has done it last. One that was given up may do it late, while another is waited for.
static ANSWERED: AtomicI32 = AtomicI32::new(0);

extern "C" fn handle(_signal: libc::c_int) {
    // SAFETY: errno is this thread's own; the code that was interrupted may be about to read it.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    let before = unsafe { *errno };
    // SAFETY: null, or a change that stays until every thread that got the signal has answered.
    if let Some(change) = unsafe { CHANGE.load(Ordering::Acquire).as_ref() } {
        LACKS.fetch_or(change.apply().0, Ordering::Relaxed);
        ANSWERED.store(gettid().as_raw_nonzero().get(), Ordering::Release);
    }
    // SAFETY: as above.
    unsafe { *errno = before };
}

/// Changes all threads of this process, one after the other, until there is none that is as before. Not by two threads at
/// once.
///
/// # Errors
///
/// Why some were not reached.
pub(super) fn change_all(change: Change) -> io::Result<Lacks> {
    LACKS.store(0, Ordering::Relaxed);
    let change = Box::into_raw(Box::new(change));
    CHANGE.store(change, Ordering::Release);
    let before = install()?;
    let reached = signal_others(SIGNAL);
    // This thread last: under the rules of Linux 6.12 to 6.14 a thread cannot signal the others of its process. It starts
    // none meanwhile.
    // SAFETY: from `Box::into_raw` above, and nothing frees it before the end of this function.
    let own = unsafe { &*change }.apply();
    LACKS.fetch_or(own.0, Ordering::Relaxed);
    // After an error a thread that has not answered may still do: handler and change stay.
    reached?;
    exchange(SIGNAL, Some(&before))?;
    CHANGE.store(ptr::null_mut(), Ordering::Release);
    // SAFETY: from `Box::into_raw` above, and no handler has it any more: each has answered.
    drop(unsafe { Box::from_raw(change) });
    Ok(Lacks(LACKS.load(Ordering::Relaxed)))
}

/// A signal that no thread blocks with the C library's functions, which keep it for setuid(2) and its kin. Threads of
/// libraries often block all others. No server changes its user.
const SIGNAL: libc::c_int = 33;

/// What the kernel knows of a signal's handler; longer than on any architecture.
type KernelAction = [usize; 8];

/// Sets the handler, and returns what it takes to undo that.
fn install() -> io::Result<KernelAction> {
    // SAFETY: all zeroes is a `sigaction` (plain numbers and a null handler).
    let (mut action, mut before): (libc::sigaction, libc::sigaction) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    action.sa_sigaction = handle as *const () as usize;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // The C library sets no handler for its own signals. So it is to set this one for another signal, from where the
    // kernel copies it.
    let other = libc::SIGRTMAX();
    // SAFETY: the handler makes system calls and stores to atomics, both of which may interrupt anything.
    if unsafe { libc::sigaction(other, &raw const action, &raw mut before) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let installed = exchange(other, None);
    // SAFETY: `before` is what the C library told; the call keeps no pointer.
    unsafe { libc::sigaction(other, &raw const before, ptr::null_mut()) };
    exchange(SIGNAL, Some(&installed?))
}

/// Sets the kernel's action for a signal, if one is given, and returns the one before.
fn exchange(signal: libc::c_int, action: Option<&KernelAction>) -> io::Result<KernelAction> {
    /// Bytes of the kernel's set of signals.
    const SET_BYTES: usize = 8;
    let mut before = KernelAction::default();
    let action = action.map_or(ptr::null(), ptr::from_ref);
    // SAFETY: an action is what the kernel told before, and no shorter than it expects. Handlers among them are the C
    // library's and `handle`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigaction,
            signal,
            action,
            &raw mut before,
            SET_BYTES,
        )
    };
    match result {
        0 => Ok(before),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Goes on after an error, which is then returned: as many threads are confined as can be.
fn signal_others(signal: libc::c_int) -> io::Result<()> {
    let own = gettid().as_raw_nonzero().get();
    let mut done = vec![own];
    let mut all_reached = Ok(());
    loop {
        let mut is_new = false;
        for thread in fs::read_dir("/proc/self/task")? {
            let thread = thread?.file_name();
            let Some(id) = thread.to_str().and_then(|id| id.parse().ok()) else {
                continue;
            };
            if done.contains(&id) || is_worker(id) {
                continue;
            }
            if let Err(error) = reach(id, signal) {
                all_reached = Err(error);
            }
            done.push(id);
            is_new = true;
        }
        // A thread that was started meanwhile by one that was not confined yet is in the next list.
        if !is_new {
            return all_reached;
        }
    }
}

/// Threads of the kernel that do what a ring has put off. They run no code of the process, and take no signals.
fn is_worker(id: i32) -> bool {
    let name = fs::read_to_string(format!("/proc/self/task/{id}/comm"));
    name.is_ok_and(|name| name.starts_with("iou-"))
}

fn reach(id: i32, signal: libc::c_int) -> io::Result<()> {
    let failed =
        |error: io::Error| io::Error::other(format!("thread {id} gets no signal: {error}"));
    ANSWERED.store(0, Ordering::Release);
    let begin = Instant::now();
    let mut looks = 0;
    let mut sent = signal;
    while ANSWERED.load(Ordering::Acquire) != id {
        match send(id, sent) {
            // From then on it is only looked whether the thread still exists.
            Ok(()) => sent = 0,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
            // The signals that wait for processes of this user are limited in number (RLIMIT_SIGPENDING).
            Err(error)
                if error.raw_os_error() == Some(libc::EAGAIN) && begin.elapsed() <= LIMIT => {}
            Err(error) => return Err(failed(error)),
        }
        looks += 1;
        if begin.elapsed() > LIMIT {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        // Where sleeps are long, on a machine with a coarse timer, hundreds of threads would take seconds.
        match looks < YIELDS {
            true => std::thread::yield_now(),
            false => std::thread::sleep(INTERVAL),
        }
    }
    Ok(())
}

/// Sends a signal to a thread of this process, or only asks whether there is such a thread.
fn send(id: i32, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: the call has no pointers.
    match unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
