//! Whether an idle queue thread polls for work or sleeps until it is woken.
//!
//! A wake-up costs the client a system call and both sides the way through the scheduler: some
//! microseconds on bare metal, tens of them on a virtual machine. A thread that polls all the time
//! answers at once and needs no notification, and takes a processor. An adaptive thread polls only
//! where recent work arrived soon enough. The figures behind each rule are in docs/decisions.md.

mod contention;
mod option;
mod poller;

pub use option::{BadPolling, Polling, SharedPolling};
pub(crate) use poller::{IdleAction, Poller};
