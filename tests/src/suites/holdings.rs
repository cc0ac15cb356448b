//! What a server has: descriptors, threads, mappings, memory.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::kit::server::Server;

/// What a process has.
#[derive(Debug)]
pub struct Holdings {
    /// Open ones.
    pub descriptors: usize,
    /// Running ones.
    pub threads: usize,
    /// Lines of its map.
    pub mappings: usize,
    /// Memory in use.
    pub resident_kib: u64,
}

impl Holdings {
    /// Of the process with this number, now.
    pub fn of(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let count = |name: &str| -> Result<usize> { Ok(fs::read_dir(proc.join(name))?.count()) };
        let status = fs::read_to_string(proc.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let resident = resident.and_then(|text| text.trim().strip_suffix(" kB")?.parse().ok());
        Ok(Self {
            descriptors: count("fd")?,
            threads: count("task")?,
            mappings: fs::read_to_string(proc.join("maps"))?.lines().count(),
            resident_kib: resident.context("no VmRSS")?,
        })
    }

    /// What the server has when its sessions are over: nobody who has left holds a thread.
    pub fn at_rest(server: &Server, threads: usize, patience: Duration) -> Result<Self> {
        let deadline = Instant::now() + patience;
        loop {
            let holdings = Self::of(server.pid())?;
            // The kernel's workers of a ring are threads, too, and end when they are not needed.
            if holdings.threads <= threads {
                return Ok(holdings);
            }
            ensure!(
                Instant::now() < deadline,
                "{threads} threads at first, and with nobody there any more: {holdings:?}"
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Nothing has grown since `before`, but for what one client more or less explains.
    pub fn are_no_more_than(&self, before: &Holdings) -> Result<()> {
        let after = self;
        ensure!(
            after.descriptors <= before.descriptors,
            "descriptors are left: {before:?}, then {after:?}"
        );
        // What grows with each client has grown by far more than this.
        ensure!(
            after.mappings <= before.mappings + 20,
            "mappings are left: {before:?}, then {after:?}"
        );
        ensure!(
            after.resident_kib <= before.resident_kib + 1024,
            "memory is left: {before:?}, then {after:?}"
        );
        Ok(())
    }
}
