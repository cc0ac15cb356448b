//! A guest of one sector: boots in seconds, says where it is on the serial port, writes to the disk
//! that it booted from when it is told to, and ends QEMU with an exit code of its own.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use testkit::process;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;

/// What the guest says when it runs.
pub const BOOTED: &str = "sector runs";

/// The exit code of QEMU when the guest could write, and when not.
pub const WRITTEN: i32 = 0x10 << 1 | 1;

/// See [`WRITTEN`].
pub const NOT_WRITTEN: i32 = 0x11 << 1 | 1;

/// QEMU's options for it, board and disk aside: the serial port on standard input and output, and
/// the device that ends QEMU.
pub const OPTIONS: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
    "-chardev",
    "stdio,id=serial,signal=off",
    "-serial",
    "chardev:serial",
    "-device",
    "isa-debug-exit,iobase=0x501,iosize=1",
];

/// The sector. It prints [`BOOTED`], waits for a byte on the serial port, writes itself to sector 1
/// of the disk, and ends.
pub fn sector() -> Vec<u8> {
    let mut code = vec![
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0x8e, 0xc0, // mov es, ax
        0xfc, // cld
        0x88, 0xd3, // mov bl, dl: the drive
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xbe, 0, 0,    // mov si, text (filled in below)
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz wait
        0xee, // out dx, al
        0xeb, 0xf8, // jmp next
        0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
        0xec, // poll: in al, dx
        0xa8, 0x01, // test al, 1
        0x74, 0xfb, // jz poll
        0x88, 0xda, // mov dl, bl
        0xb6, 0x00, // mov dh, 0
        0xbb, 0x00, 0x7c, // mov bx, 0x7c00
        0xb9, 0x02, 0x00, // mov cx, 2
        0xb8, 0x01, 0x03, // mov ax, 0x0301: write one sector
        0xcd, 0x13, // int 0x13
        0xb0, 0x10, // mov al, 0x10
        0x73, 0x02, // jnc end
        0xb0, 0x11, // mov al, 0x11
        0xba, 0x01, 0x05, // end: mov dx, 0x501
        0xee, // out dx, al
        0xf4, // halt: hlt
        0xeb, 0xfd, // jmp halt
    ];
    let text = 0x7c00 + u16::try_from(code.len()).expect("it is short");
    code[13..15].copy_from_slice(&text.to_le_bytes());
    code.extend(BOOTED.bytes());
    code.resize(SECTOR_BYTES - 2, 0);
    code.extend([0x55, 0xaa]);
    code
}

/// QEMU, or what leads to it, with the guest in it.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    output: Receiver<Vec<u8>>,
    said: String,
    limit: Duration,
}

impl Guest {
    /// Starts the command and waits until the sector runs.
    pub fn boot(command: &mut Command, limit: Duration) -> Result<Self> {
        let errors = tempfile::NamedTempFile::new().context("cannot make a temporary file")?;
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors.reopen().context("cannot share a temporary file")?);
        let mut child = process::spawn_group(command)?;
        let mut stdout = child.stdout.take().context("no output")?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = stdout.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        let mut guest = Guest {
            child,
            output,
            said: String::new(),
            limit,
        };
        match guest.hear(BOOTED) {
            Ok(()) => Ok(guest),
            Err(error) => {
                let said = std::fs::read_to_string(errors.path()).unwrap_or_default();
                Err(error.context(format!("the guest does not boot: {}", said.trim())))
            }
        }
    }

    fn hear(&mut self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + self.limit;
        while !self.said.contains(wanted) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.said.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => bail!("it says only {:?}", self.said),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("it ended after {:?}", self.said)
                }
            }
        }
        Ok(())
    }

    /// The process that was started.
    pub fn process(&self) -> &Child {
        &self.child
    }

    /// Lets the guest write sector 1 and end.
    pub fn tell(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("no input")?;
        stdin.write_all(b"!").context("cannot tell the guest")
    }

    /// Lets the guest write sector 1 and end, and checks that it could.
    pub fn write_and_end(mut self) -> Result<()> {
        self.tell()?;
        let code = self.wait()?.code();
        ensure!(
            code == Some(WRITTEN),
            "the guest ended with {code:?}; {WRITTEN} means written, {NOT_WRITTEN} not"
        );
        Ok(())
    }

    /// Waits for the end of the process.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        process::wait_limited(&mut self.child, self.limit)?.context("the guest does not end")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        process::kill_group(&mut self.child);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sector_is_one_that_a_pc_boots() {
        let sector = sector();
        assert_eq!(sector.len(), SECTOR_BYTES);
        assert_eq!(sector[510..], [0x55, 0xaa]);
        let text = usize::from(u16::from_le_bytes([sector[13], sector[14]])) - 0x7c00;
        assert!(sector[text..].starts_with(BOOTED.as_bytes()));
    }
}
