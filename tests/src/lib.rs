//! The lab: kernels, machines and test suites for ublkup.
//!
//! A test is a Rust function and a line in a table (see `suites`). It runs in
//! a process of its own, on the host or inside a kernel that the lab built and
//! booted, and may use the helpers in `kit`. `docs/lab.md` tells the whole
//! story.

mod agent;
mod bench;
mod cache;
mod cargo;
mod channel;
pub mod cli;
mod demo;
mod doctor;
mod fuzz;
mod guest;
mod job;
mod kernel;
mod kit;
mod klog;
mod kublk;
mod machine;
mod mutants;
mod package;
mod packages;
mod progress;
mod report;
mod runner;
mod suites;
mod test;
