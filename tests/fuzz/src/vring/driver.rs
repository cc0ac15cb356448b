//! The driver: what it writes to its memory, and when.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use rustix::event::{EventfdFlags, eventfd};
use ublkup::door::vhost::testing::at_each_access;

use super::FEATURES;
use super::world::{AVAILABLE, BUFFERS, DESCRIPTORS, MEMORY_BYTES, USED, World, guest};
use crate::Script;

/// The largest ring.
pub(super) const MAX_QUEUE: u16 = 64;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A change of memory.
struct Change {
    offset: u64,
    bytes: [u8; 8],
    len_bytes: usize,
}

/// Changes that come in so many accesses, each after the one before.
type Changes = Rc<RefCell<VecDeque<(u16, Change)>>>;

pub(super) struct Driver<'a> {
    world: &'a World,
    pub(super) size: u16,
    pub(super) features: u64,
    /// Where the vring begins, or goes on.
    pub(super) base: u16,
    used: u16,
    available: u16,
    chains: u64,
    changes: Changes,
    /// Whether it wrote what only the device writes, or may have.
    is_wild: bool,
    kick: Option<OwnedFd>,
    error: Option<OwnedFd>,
}

/// A descriptor to be notified through.
pub(super) fn signal() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("made")
}

impl<'a> Driver<'a> {
    pub(super) fn new(world: &'a World, script: &mut Script<'_>) -> Self {
        let size = 1 << (script.u8() % 7);
        let bits = script.u8();
        let features = FEATURES.iter().enumerate();
        let features = features.filter(|(at, _)| bits >> at & 1 != 0);
        let features = features.fold(0, |all, (_, bit)| all | 1 << bit);
        // A ring goes on where it was, which is anywhere.
        let base = script.u16();
        let driver = Self {
            world,
            size,
            features,
            base,
            used: base,
            available: base,
            chains: 0,
            changes: Changes::default(),
            is_wild: false,
            kick: None,
            error: None,
        };
        driver.put(USED + 2, &base.to_le_bytes());
        driver.put(AVAILABLE + 2, &base.to_le_bytes());
        driver
    }

    fn put(&self, offset: u64, bytes: &[u8]) {
        World::put(&self.world.file, offset, bytes);
    }

    /// The descriptor to kick through from now on.
    pub(super) fn new_kick(&mut self) -> OwnedFd {
        self.kick.insert(signal()).try_clone().expect("cloned")
    }

    /// The descriptor that says from now on that the vring is broken.
    pub(super) fn new_error(&mut self) -> OwnedFd {
        self.error.insert(signal()).try_clone().expect("cloned")
    }

    pub(super) fn kick(&self) {
        if let Some(kick) = &self.kick {
            rustix::io::write(kick, &1_u64.to_ne_bytes()).expect("room for a kick");
        }
    }

    /// Whether the server said that the vring is broken.
    fn is_broken(&self) -> bool {
        let error = self.error.as_ref().expect("a vring was started");
        rustix::io::read(error, &mut [0; 8]).is_ok()
    }

    fn change_of(script: &mut Script<'_>) -> Change {
        const PLACES: [u64; 8] = [
            DESCRIPTORS,
            AVAILABLE,
            AVAILABLE + 2,
            USED,
            USED + 2,
            BUFFERS,
            BUFFERS + 0x1000,
            BUFFERS + 0x2f00,
        ];
        let place = script.pick(&PLACES) + u64::from(script.u8());
        let len_bytes = script.pick(&[2, 1, 4, 8]);
        Change {
            offset: place % MEMORY_BYTES,
            bytes: script.u64().to_le_bytes(),
            len_bytes,
        }
    }

    /// Changes memory now.
    pub(super) fn change(&mut self, script: &mut Script<'_>) {
        let change = Self::change_of(script);
        self.is_wild = true;
        self.put(change.offset, &change.bytes[..change.len_bytes]);
    }

    /// Changes memory in so many of the server's accesses.
    pub(super) fn change_at_access(&mut self, script: &mut Script<'_>) {
        let wait = u16::from(script.u8());
        let change = Self::change_of(script);
        self.is_wild = true;
        let mut changes = self.changes.borrow_mut();
        changes.push_back((wait, change));
        if changes.len() > 1 {
            return;
        }
        drop(changes);
        let (file, changes) = (Rc::clone(&self.world.file), Rc::clone(&self.changes));
        at_each_access(Some(Box::new(move || {
            let mut changes = changes.borrow_mut();
            let Some((wait, change)) = changes.front_mut() else {
                return;
            };
            if let Some(less) = wait.checked_sub(1) {
                *wait = less;
                return;
            }
            World::put(&file, change.offset, &change.bytes[..change.len_bytes]);
            changes.pop_front();
        })));
    }

    pub(super) fn forget_changes(&mut self) {
        self.changes.borrow_mut().clear();
        at_each_access(None);
    }

    /// Writes a chain and makes it available.
    pub(super) fn make_available(&mut self, script: &mut Script<'_>) {
        let layout = script.u8();
        let number = self.chains % 16;
        self.chains += 1;
        let kind = match script.u8() {
            7.. => script.u32(),
            // In, out, flush, id, discard, write-zeroes, legacy barrier.
            n => [0, 1, 4, 8, 11, 13, 1 << 31][usize::from(n)],
        };
        let sector = match script.u8() {
            255 => script.u64(),
            254 => super::DISK_BYTES / 512 - 1,
            n => n.into(),
        };
        let header = BUFFERS + 0x40 * number;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(header, &bytes);
        let mut chain = vec![(guest(header), 16, 0)];
        let segments = layout >> 2 & 3;
        for _ in 0..segments {
            chain.push(self.data(script, kind));
        }
        if layout & 0x10 != 0 {
            // The header in two parts.
            chain[0].1 = 7;
            chain.insert(1, (guest(header) + 7, 9, 0));
        }
        chain.push((guest(header) + 0x20, script.pick(&[1, 0, 4, 16]), WRITE));
        if layout & 0x20 != 0 {
            // In an order, or of a length, that it must not have.
            let at = usize::from(script.u8()) % chain.len();
            chain.remove(at);
        }
        let head = u16::from(script.u8()) % self.size;
        if layout & 1 != 0 {
            let table = match script.u8() & 3 {
                // Across the border of two regions.
                3 => 0x3ff8 - 16 * (number % 2),
                _ => BUFFERS + 0x1000 + 0x80 * number,
            };
            self.table(table, 0, u16::MAX, &chain);
            let len = u32::try_from(16 * chain.len()).unwrap_or(0);
            self.table(
                DESCRIPTORS,
                head,
                self.size,
                &[(guest(table), len, INDIRECT)],
            );
        } else {
            self.table(DESCRIPTORS, head, self.size, &chain);
        }
        self.publish(head);
    }

    /// A buffer.
    fn data(&mut self, script: &mut Script<'_>, kind: u32) -> (u64, u32, u16) {
        let bits = script.u8();
        let flags = match bits & 1 {
            0 if kind == 0 || kind == 8 => WRITE,
            0 => 0,
            _ => WRITE,
        };
        let len = match bits >> 1 & 7 {
            0 | 1 => 512,
            2 => 4096,
            3 => 1024,
            4 => 16,
            5 => 20,
            6 => 0,
            _ => script.u32(),
        };
        let at = match bits >> 4 & 7 {
            0..=2 => guest(BUFFERS + 0x1c00),
            3 => guest(BUFFERS + 0x2f00),
            4 => guest(BUFFERS + 0x3000),
            5 => guest(BUFFERS + 0x2ff0),
            6 => guest(MEMORY_BYTES - 0x200),
            _ => {
                self.is_wild = true;
                guest(u64::from(script.u16()).wrapping_sub(0x800))
            }
        };
        // A long one may reach the used ring.
        self.is_wild |= len > 4096;
        (at, len, flags)
    }

    /// Writes descriptors of a table from `first` on.
    fn table(&self, table: u64, first: u16, size: u16, chain: &[(u64, u32, u16)]) {
        for (number, &(address, len, flags)) in (0_u16..).zip(chain) {
            let at = first.wrapping_add(number) % size;
            let is_last = usize::from(number) + 1 == chain.len();
            let flags = if is_last { flags } else { flags | NEXT };
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&(first.wrapping_add(number + 1) % size).to_le_bytes());
            self.put(table + 16 * u64::from(at), &bytes);
        }
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size);
        self.put(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(AVAILABLE + 2, &self.available.to_le_bytes());
    }

    /// A vring that stopped has answered each chain that it took.
    pub(super) fn check_stopped(&mut self, base: u16, with_record: bool) {
        let mut used = [0; 2];
        let read = self.world.file.read_exact_at(&mut used, USED + 2);
        read.expect("read");
        let used = u16::from_le_bytes(used);
        if !self.is_wild && !self.is_broken() {
            match with_record {
                // With what was in flight on a ring that was broken before.
                true => assert_eq!(base, used, "chains taken, and answered"),
                false => {
                    let taken = base.wrapping_sub(self.base);
                    let answered = used.wrapping_sub(self.used);
                    assert_eq!(taken, answered, "chains taken, and answered");
                }
            }
        }
        self.used = used;
    }
}
