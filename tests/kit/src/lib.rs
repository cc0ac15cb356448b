//! What tests of ublkup share, those of `server/tests` and those of the lab.
//!
//! - [`sandbox`]: a directory with a runtime directory of its own, and commands of ublkup in it;
//! - [`server`]: a running `ublkup serve`, which is started, stopped or killed;
//! - [`vhost`]: a vhost-user front-end with guest memory and split rings, and raw messages;
//! - [`ublk_control`] and [`qmp`]: commands to the ublk driver and to QEMU;
//! - [`namespaces`], [`random`], [`images`], [`shell`], [`process`], [`proc`], [`seccomp`], [`wait`]: reproducible random numbers,
//!   files with known content, commands with a time limit, child processes that end, facts about them, forbidden
//!   system calls, waiting for a condition.

pub mod images;
pub mod namespaces;
pub mod proc;
pub mod process;
/// The launcher's client of QEMU's monitor.
#[path = "../../../server/src/engine/qmp.rs"]
pub mod qmp;
pub mod random;
pub mod sandbox;
pub mod seccomp;
pub mod server;
pub mod shell;
pub mod ublk_control;
pub mod vhost;
pub mod wait;
