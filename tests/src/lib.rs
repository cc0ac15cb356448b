//! The lab: kernels, machines and test suites for ublkup.
//!
//! A test is a Rust function and a line in a table (see [`suites`]). It runs in
//! a process of its own, on the host or inside a kernel that the lab built and
//! booted, and may use the helpers in [`kit`]. `docs/lab.md` tells the whole
//! story.

pub mod agent;
pub mod bench;
pub mod cache;
pub mod cargo;
pub mod channel;
pub mod cli;
pub mod demo;
pub mod doctor;
pub mod guest;
pub mod job;
pub mod kernel;
pub mod kit;
pub mod klog;
pub mod kublk;
pub mod machine;
pub mod mutants;
pub mod packages;
pub mod progress;
pub mod report;
pub mod runner;
pub mod suites;
pub mod test;
