//! Fuzz targets: functions that take any bytes, do with the project's code what these bytes say, and panic if it does
//! anything that it must not. docs/fuzzing.md tells how they are run and what they found.
//!
//! | target     | what the bytes are                                                                        |
//! |------------|-------------------------------------------------------------------------------------------|
//! | `vring`    | what a driver does to its rings and its memory, also between two accesses of the server     |
//! | `messages` | messages of a vhost-user client, with descriptors, in any order                             |
//! | `inflight` | a record of chains in flight, and at which store the server that wrote it died              |
//! | `config`   | a SPEC, or a configuration file                                                             |
//! | `admin`    | a request at an admin socket, or the answer to one                                          |
//! | `registry` | what is in the directory where clients look for the service of a file                       |
//! | `ring`     | what the other end of a ring does to the memory that both share                             |

#![cfg(feature = "testing")]

pub mod admin;
pub mod config;
pub mod inflight;
pub mod messages;
pub mod registry;
pub mod ring;
mod script;
pub mod vring;

use script::Script;
use ublkup::request::{Limits, small_disk};

/// A disk that takes everything.
fn limits(capacity_bytes: u64) -> Limits {
    Limits {
        max_discard_bytes: 64 << 10,
        max_write_zeroes_bytes: 64 << 10,
        ..small_disk(capacity_bytes)
    }
}

/// A target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: of its program, and of the folder of its corpus.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
}

/// All targets.
pub const TARGETS: [Target; 7] = [
    Target {
        name: "vring",
        run: vring::run,
    },
    Target {
        name: "messages",
        run: messages::run,
    },
    Target {
        name: "inflight",
        run: inflight::run,
    },
    Target {
        name: "config",
        run: config::run,
    },
    Target {
        name: "admin",
        run: admin::run,
    },
    Target {
        name: "registry",
        run: registry::run,
    },
    Target {
        name: "ring",
        run: ring::run,
    },
];
