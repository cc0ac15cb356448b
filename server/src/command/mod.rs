//! The subcommands, one file each; `cli.rs` is the command line.

pub mod cli;
pub mod client;
pub mod doctor;
mod left;
mod manager;
mod manual;
mod names;
mod output;
pub mod probe;
mod program;
pub mod qemu;
mod reference;
pub mod serve;
pub mod shell;
mod signals;
pub mod watch;

pub use output::complain;
