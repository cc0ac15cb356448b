//! Commands to the ublk driver from a process that is not the server, as an administrator's tool
//! would send them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

// Numbers of `include/uapi/linux/ublk_cmd.h`: `_IOR` or `_IOWR` of `('u', number, struct
// ublksrv_ctrl_cmd)`, which has 32 bytes.
const READS: u32 = 2 << 30 | 32 << 16 | 0x75 << 8;
const READS_AND_WRITES: u32 = 3 << 30 | 32 << 16 | 0x75 << 8;
const GET_DEV_INFO: u32 = READS | 0x02;
const DEL_DEV: u32 = READS_AND_WRITES | 0x05;
const STOP_DEV: u32 = READS_AND_WRITES | 0x07;

/// Bytes of `struct ublksrv_ctrl_dev_info`.
const INFO_BYTES: usize = 64;

/// What the driver knows of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Info {
    /// Hardware queues.
    pub queues: u16,
    /// Requests under way per queue.
    pub depth: u16,
    /// Whether it is served.
    pub state: State,
    /// Largest request.
    pub buffer_bytes: u32,
    /// Its number.
    pub id: u32,
    /// The server; -1 if there is none.
    pub server_pid: i32,
    /// `UBLK_F_` bits.
    pub flags: u64,
}

/// `UBLK_S_DEV_` of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not started, or over.
    Dead,
    /// A server serves it.
    Live,
    /// It waits for a server, and so do its requests.
    Quiesced,
    /// It waits for a server, and its requests fail.
    FailIo,
    /// One that this was not written for.
    Other(u16),
}

impl State {
    /// The name without its prefix.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Dead => "DEAD",
            State::Live => "LIVE",
            State::Quiesced => "QUIESCED",
            State::FailIo => "FAIL_IO",
            State::Other(_) => "UNKNOWN",
        }
    }
}

/// The driver's control device.
#[derive(Debug)]
pub struct Control(File);

impl Control {
    /// Opens it.
    ///
    /// # Errors
    /// There is none, or not for this user.
    pub fn open() -> Result<Self> {
        let path = "/dev/ublk-control";
        let file = OpenOptions::new().read(true).write(true).open(path);
        file.map(Self)
            .with_context(|| format!("cannot open {path}"))
    }

    /// What the driver knows of a device.
    ///
    /// # Errors
    /// There is no such device (ENODEV).
    pub fn info(&self, id: u32) -> io::Result<Info> {
        let mut bytes = [0u8; INFO_BYTES];
        self.command(GET_DEV_INFO, id, &mut bytes)?;
        let half = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        Ok(Info {
            queues: half(0),
            depth: half(2),
            state: match half(4) {
                0 => State::Dead,
                1 => State::Live,
                2 => State::Quiesced,
                3 => State::FailIo,
                other => State::Other(other),
            },
            buffer_bytes: word(8),
            id: word(12),
            server_pid: word(16).cast_signed(),
            flags: u64::from(word(24)) | u64::from(word(28)) << 32,
        })
    }

    /// Stops a device, whichever process serves it.
    ///
    /// # Errors
    /// There is no such device.
    pub fn stop(&self, id: u32) -> io::Result<()> {
        self.command(STOP_DEV, id, &mut [])
    }

    /// Deletes a device; ends when its number is free.
    ///
    /// # Errors
    /// There is no such device.
    pub fn delete(&self, id: u32) -> io::Result<()> {
        self.command(DEL_DEV, id, &mut [])
    }

    /// One command, with a buffer of its own if it has any.
    fn command(&self, number: u32, id: u32, buffer: &mut [u8]) -> io::Result<()> {
        // `struct ublksrv_ctrl_cmd`: dev_id, queue_id (none), len, addr, then zeroes.
        let mut command = [0u8; 80];
        command[..4].copy_from_slice(&id.to_ne_bytes());
        command[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        if !buffer.is_empty() {
            let len = u16::try_from(buffer.len()).map_err(io::Error::other)?;
            command[6..8].copy_from_slice(&len.to_ne_bytes());
            let address = buffer.as_mut_ptr() as u64;
            command[8..16].copy_from_slice(&address.to_ne_bytes());
        }
        let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder().build(2)?;
        let sqe = opcode::UringCmd80::new(types::Fd(self.0.as_raw_fd()), number)
            .cmd(command)
            .build();
        // SAFETY: the command is in the entry itself; the descriptor and the buffer outlive the wait
        // for its completion.
        unsafe { ring.submission().push(&sqe) }.map_err(io::Error::other)?;
        ring.submit_and_wait(1)?;
        let done = ring.completion().next();
        let result = done.map_or(-libc::EIO, |done| done.result());
        match result {
            0.. => Ok(()),
            _ => Err(io::Error::from_raw_os_error(-result)),
        }
    }
}

/// Stops the device with this number, whichever process serves it.
///
/// # Errors
/// There is no driver, or no such device.
pub fn stop_device(id: u32) -> Result<()> {
    let stopped = Control::open()?.stop(id);
    stopped.with_context(|| format!("STOP_DEV of ublk{id}"))
}
