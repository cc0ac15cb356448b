//! The subcommands, one file each; `cli.rs` is the command line.

pub mod cli;
pub mod client;
pub mod doctor;
pub mod probe;
pub mod qemu;
pub mod serve;
mod signals;
