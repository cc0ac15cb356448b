//! ublkup: one storage backend, two doors.
//!
//! The way of a request goes [`door`] → [`queue_thread`] → [`backend`] and back; [`request`] holds
//! the words they share and [`io`] the ring they work on. [`device`] puts an export together from
//! them; `docs/ARCHITECTURE.md` tells the whole story.

pub mod access;
pub mod backend;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod counters;
pub mod crash;
pub mod device;
pub mod doctor;
pub mod door;
pub mod io;
pub mod offer;
pub mod polling;
pub mod probe;
pub mod qemu;
pub mod queue_thread;
pub mod request;
pub mod runtime;
pub mod serve;
pub mod signals;
pub mod threads;
