//! `ublkup qemu`: QEMU with disks that go straight to the servers behind their block devices.
//!
//! | file        | tells                                                                      |
//! |-------------|----------------------------------------------------------------------------|
//! | `launch.rs` | a new guest: claims the block devices and runs QEMU with vhost-user disks  |
//! | `live/`     | a running guest: exchanges a disk through QEMU's monitor                   |
//! | `disk.rs`   | QEMU's options for a disk                                                  |
//! | `memory.rs` | what a command line says of the guest's memory, which must be shared       |
//! | `words.rs`  | the syntax of QEMU's options and of the shell                              |

mod disk;
mod launch;
mod live;
mod memory;

mod words;

pub(super) use words::quote;

pub use launch::{Launch, launch};
pub use live::{Move, move_disk};
