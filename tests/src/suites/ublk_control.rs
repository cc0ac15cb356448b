//! A command to the ublk driver from a process that is not the server, as an administrator's tool
//! would send it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result, ensure};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// `UBLK_U_CMD_STOP_DEV`: `_IOWR('u', 0x07, struct ublksrv_ctrl_cmd)`, 32 bytes
/// (`include/uapi/linux/ublk_cmd.h`).
const STOP_DEV: u32 = 3 << 30 | 32 << 16 | 0x75 << 8 | 0x07;

/// Stops the device with this number, whoever serves it.
pub fn stop_device(id: u32) -> Result<()> {
    let control = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/ublk-control")
        .context("cannot open /dev/ublk-control")?;
    // `struct ublksrv_ctrl_cmd`: dev_id, queue_id (none), then zeroes.
    let mut command = [0u8; 80];
    command[..4].copy_from_slice(&id.to_ne_bytes());
    command[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
    let mut ring: IoUring<squeue::Entry128, cqueue::Entry> = IoUring::builder()
        .build(2)
        .context("cannot set up io_uring")?;
    let sqe = opcode::UringCmd80::new(types::Fd(control.as_raw_fd()), STOP_DEV)
        .cmd(command)
        .build();
    // SAFETY: the command is in the entry itself, and the descriptor is open until the end.
    unsafe { ring.submission().push(&sqe) }.context("the ring is full")?;
    ring.submit_and_wait(1).context("cannot submit STOP_DEV")?;
    let result = ring.completion().next().context("no completion")?.result();
    ensure!(
        result == 0,
        "STOP_DEV of ublk{id}: {}",
        io::Error::from_raw_os_error(-result)
    );
    Ok(())
}
