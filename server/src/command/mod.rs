//! The subcommands, one file each; `cli.rs` is the command line.

pub mod add;
pub mod cli;
pub mod client;
pub mod doctor;
mod left;
mod manager;
mod manual;
pub mod metrics;
mod names;
mod output;
pub mod probe;
mod program;
pub mod qemu;
mod rates;
mod reference;
pub mod reload;
pub mod serve;
pub mod serve_args;
mod service;
pub mod shell;
mod signals;
pub mod snapshot;
pub mod top;
pub mod watch;

pub use output::complain;
