//! ublkup: one storage backend, two doors.
//!
//! The way of a request goes [`door`] → [`queue_thread`] → [`backend`] and back; [`request`] holds
//! the words they share and [`io`] the ring they work on.

pub mod backend;
pub mod config;
pub mod control;
pub mod counters;
pub mod door;
pub mod io;
pub mod queue_thread;
pub mod request;
pub mod runtime;
