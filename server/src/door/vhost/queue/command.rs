//! What a queue thread is asked for.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;

use crate::door::vhost::dirty::Logging;
use crate::door::vhost::memory::MemoryMap;
use crate::door::vhost::ring_layout::RingError;
use crate::door::vhost::vring::{Start, Stopped};

/// What the protocol thread asks of a queue thread. It waits for the reply before it acknowledges
/// the client's message: what a client was told is done, is done.
pub(in crate::door::vhost) enum Command {
    /// Serve a vring.
    Start(Box<Start>, mpsc::Sender<Result<(), RingError>>),
    /// Finish what is in flight of a vring, publish it, and let go of the vring.
    Stop(u16, mpsc::Sender<Stopped>),
    /// Take chains from a vring, or leave them there.
    Enable(u16, bool, mpsc::Sender<()>),
    /// Notify through another descriptor from now on.
    Call(u16, Option<OwnedFd>, mpsc::Sender<()>),
    /// Report a broken vring through this descriptor.
    Error(u16, Option<OwnedFd>, mpsc::Sender<()>),
    /// Use another memory map for everything that begins from now on, and this log of dirty pages for
    /// everything that ends from now on.
    Memory(Arc<MemoryMap>, Option<Logging>, mpsc::Sender<()>),
    /// Mark what is written to the used ring of a vring, which is there for the log; or do not.
    LogUsed(u16, Option<u64>, mpsc::Sender<()>),
    /// Finish everything and end.
    Exit,
}
