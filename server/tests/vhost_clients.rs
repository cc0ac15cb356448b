//! Front-ends that others wrote.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]

mod common;

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::{Child, Command, Stdio};

use common::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use ublkup::storage::Memory as MemoryDisk;
use vhost::VhostBackend;
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

/// Waits for one completion on a queue.
fn wait(transport: &VirtioBlkTransport, queue: &mut VirtioBlkQueue<'_, u64>, index: usize) -> u64 {
    transport.get_submission_notifier(index).notify().unwrap();
    loop {
        if let Some(done) = queue.completions().next() {
            assert_eq!(done.ret, 0, "request {}", done.context);
            return done.context;
        }
        let fd = transport.get_completion_fd(index);
        // SAFETY: the transport keeps the descriptor open.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let limit = Timespec::try_from(PATIENCE).unwrap();
        let mut fds = [PollFd::from_borrowed_fd(borrowed, PollFlags::IN)];
        assert!(
            poll(&mut fds, Some(&limit)).unwrap() > 0,
            "no notification came"
        );
        fd.read().unwrap();
    }
}

#[test]
fn the_virtio_driver_crate_reads_what_it_wrote_on_four_queues() {
    let fixture = Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 4);
    let features = VirtioFeatureFlags::VERSION_1
        | VirtioFeatureFlags::RING_EVENT_IDX
        | VirtioFeatureFlags::RING_INDIRECT_DESC;
    let blk = FLUSH | DISCARD | WRITE_ZEROES | 1 << 12;
    let path = fixture.door.path().to_str().unwrap();
    let mut transport: Box<VirtioBlkTransport> =
        Box::new(VhostUser::new(path, features.bits() | blk).unwrap());
    let mut queues = VirtioBlkQueue::<u64>::setup_queues(&mut *transport, 4, 64).unwrap();
    let len = 1 << 20;
    let file = File::from(memfd_create("buffers", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, len as u64).unwrap();
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice; it stays to the end.
    let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, &file, 0) };
    let base = base.unwrap().cast::<u8>();
    transport
        .map_mem_region(base as usize, len, file.as_raw_fd(), 0)
        .unwrap();
    let bytes = 128 << 10;
    // SAFETY: `base` is mapped for `len` bytes, of which the two halves are used in turn; the
    // device writes only while a read is waited for.
    let (out, back) = unsafe {
        (
            std::slice::from_raw_parts_mut(base, bytes),
            std::slice::from_raw_parts_mut(base.add(len / 2), bytes),
        )
    };
    for (index, queue) in queues.iter_mut().enumerate() {
        let offset = (index as u64) << 20;
        queue.set_used_notif_enabled(true);
        let fill = u8::try_from(index).unwrap() + 1;
        out.iter_mut()
            .zip(0u8..=250)
            .for_each(|(byte, n)| *byte = n ^ fill);
        out[250..].fill(fill);
        queue.write(offset, out, 1).unwrap();
        assert_eq!(wait(&*transport, queue, index), 1);
        queue.flush(2).unwrap();
        assert_eq!(wait(&*transport, queue, index), 2);
        queue.read(offset, back, 3).unwrap();
        assert_eq!(wait(&*transport, queue, index), 3);
        assert_eq!(out, back);
        queue.discard(offset, 4096, 4).unwrap();
        assert_eq!(wait(&*transport, queue, index), 4);
        queue.read(offset, back, 5).unwrap();
        assert_eq!(wait(&*transport, queue, index), 5);
        assert!(back[..4096].iter().all(|&byte| byte == 0));
        assert_eq!(back[4096..], out[4096..]);
    }
    let totals = fixture.counters.totals();
    assert_eq!((totals.reads, totals.writes, totals.errors), (8, 4, 0));
    drop(queues);
    drop(transport);
    fixture.wait_empty();
}

/// A child that does not outlive the test.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_firmware_of_a_qemu_machine_reads_the_boot_sector() {
    let qemu = "qemu-system-x86_64";
    if let Err(error) = Command::new(qemu).arg("--version").output() {
        panic!("cannot run {qemu}: {error}; `cargo lab setup` installs it (qemu-system-x86)");
    }
    let fixture = Fixture::new(MemoryDisk::new(limits(64 << 20)).unwrap(), 1);
    // A boot sector that halts; the driver writes it as a client that leaves before QEMU comes.
    let mut sector = [0u8; 512];
    sector[..3].copy_from_slice(&[0xfa, 0xf4, 0xeb]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut driver = Driver::running(fixture.connect(), USUAL);
    assert_eq!(driver.write(0, &sector), OK);
    driver.frontend.get_vring_base(0).unwrap();
    drop(driver);
    let before = fixture.counters.totals();
    let log = fixture.scratch.path().join("qemu.log");
    let child = Command::new(qemu)
        .args("-nodefaults -machine q35 -accel tcg -cpu max -smp 2 -m 64M -display none".split(' '))
        .args(["-object", "memory-backend-memfd,id=m,size=64M,share=on"])
        .args(["-numa", "node,memdev=m"])
        .args([
            "-chardev",
            &format!("socket,id=c,path={}", fixture.door.path().display()),
        ])
        .args(["-device", "vhost-user-blk-pci,chardev=c,bootindex=1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let mut child = Reaped(child);
    eventually("the firmware reads sector 0", || {
        let ended = child.0.try_wait().unwrap();
        let said = || std::fs::read_to_string(&log).unwrap();
        assert!(ended.is_none(), "qemu ended: {}", said());
        let totals = fixture.counters.totals();
        totals.reads > before.reads && totals.read_bytes - before.read_bytes >= 512
    });
    assert_eq!(fixture.counters.totals().errors, 0);
    drop(child);
    fixture.wait_empty();
}
