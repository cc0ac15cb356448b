//! ublkup: one storage, two doors.
//!
//! A request goes [`door`] → [`engine`] → [`storage`] and back; [`request`] holds the words they
//! share and [`io`] the ring they work on. [`export`] puts a served disk together from them,
//! [`config`] says how, [`command`] is what a person types. A room imports only from rooms below
//! it: `command`, `export`, `config`, `door`, `storage`, `engine`, then `io` and `request`.
//! `docs/ARCHITECTURE.md` tells the whole story.

pub mod command;
pub mod config;
pub mod door;
pub mod engine;
pub mod export;
pub mod io;
pub mod request;
pub mod storage;
