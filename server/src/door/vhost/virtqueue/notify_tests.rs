//! Every order in which two processors may see the words of a ring, run by loom: the device's steps are those
//! of `notify`, the driver's those of virtio 1.3, 2.7.13 and 2.7.14.
//!
//! Each model is run as it is, and with one ordering of the device's steps weakened, which must be noticed: as
//! a lost notification (nothing runs any more) or as an access to an entry that is not there yet.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::sync::Notify;
use loom::sync::atomic::{AtomicBool, AtomicU16, fence};

use super::*;

/// What is wrong with the device's steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weakened {
    Nothing,
    NoFence,
    /// Acquire and release only, which on x86 is no instruction.
    WeakFence,
    /// The index is published without `Release`.
    Publish,
    /// The driver's index is loaded without `Acquire`.
    Poll,
}

/// A ring of one entry in each direction.
struct Ring {
    weakened: Weakened,
    words: [AtomicU16; 6],
    available_entry: UnsafeCell<u16>,
    used_entry: UnsafeCell<u16>,
    /// An eventfd: set by the notifier, awaited and cleared by the sleeper.
    bell: Notify,
    /// Tells the driver that the device slept, so that a model that never sleeps is noticed.
    slept: AtomicBool,
}

impl Ring {
    fn new(weakened: Weakened) -> Self {
        Self {
            weakened,
            words: std::array::from_fn(|_| AtomicU16::new(0)),
            available_entry: UnsafeCell::new(0),
            used_entry: UnsafeCell::new(0),
            bell: Notify::new(),
            slept: AtomicBool::new(false),
        }
    }

    fn word(&self, word: Word) -> &AtomicU16 {
        &self.words[word as usize]
    }

    fn sleep(&self) {
        self.slept.store(true, Relaxed);
        self.bell.wait();
    }

    /// The driver makes one chain available (2.7.13).
    fn driver_adds(&self, event_index: bool) {
        // SAFETY: loom checks that nothing else accesses the entry now.
        self.available_entry.with_mut(|entry| unsafe { *entry = 7 });
        self.word(Word::AvailableIndex).store(1, Release);
        fence(Ordering::SeqCst);
        let kick = if event_index {
            self.word(Word::AvailableEvent).load(Relaxed) == 0
        } else {
            self.word(Word::UsedFlags).load(Relaxed) & USED_NO_NOTIFY == 0
        };
        if kick {
            self.bell.notify();
        }
    }

    /// The device takes it, and sleeps until it is there.
    fn device_takes(&self, event_index: bool) -> u16 {
        disable_kicks(self, event_index);
        loop {
            if available_index(self) != 0 {
                // SAFETY: as above.
                return self.available_entry.with(|entry| unsafe { *entry });
            }
            if !enable_kicks(self, event_index, 0) {
                self.sleep();
            }
            disable_kicks(self, event_index);
        }
    }

    /// The device returns one chain.
    fn device_returns(&self, event_index: bool) {
        // SAFETY: as above.
        self.used_entry.with_mut(|entry| unsafe { *entry = 9 });
        publish(self, 1);
        if wants_notification(self, event_index, 0, 1) {
            self.bell.notify();
        }
    }

    /// The driver takes it back, and sleeps until it is there (2.7.14).
    fn driver_takes_back(&self, event_index: bool) -> u16 {
        loop {
            if self.word(Word::UsedIndex).load(Acquire) != 0 {
                // SAFETY: as above.
                return self.used_entry.with(|entry| unsafe { *entry });
            }
            if event_index {
                self.word(Word::UsedEvent).store(0, Relaxed);
            } else {
                self.word(Word::AvailableFlags).store(0, Relaxed);
            }
            fence(Ordering::SeqCst);
            if self.word(Word::UsedIndex).load(Relaxed) == 0 {
                self.sleep();
            }
        }
    }

    /// The other side asks for nothing until it is about to sleep.
    fn driver_is_busy(&self, event_index: bool) {
        if event_index {
            self.word(Word::UsedEvent).store(u16::MAX, Relaxed);
        } else {
            self.word(Word::AvailableFlags)
                .store(AVAIL_NO_INTERRUPT, Relaxed);
        }
    }

    /// The device asks for nothing until it is about to sleep.
    fn device_is_busy(&self, event_index: bool) {
        if event_index {
            self.word(Word::AvailableEvent).store(u16::MAX, Relaxed);
        } else {
            self.word(Word::UsedFlags).store(USED_NO_NOTIFY, Relaxed);
        }
    }
}

impl Words for Ring {
    fn load(&self, word: Word, order: Ordering) -> u16 {
        let weak = self.weakened == Weakened::Poll;
        self.word(word).load(if weak { Relaxed } else { order })
    }

    fn store(&self, word: Word, value: u16, order: Ordering) {
        let weak = self.weakened == Weakened::Publish;
        self.word(word)
            .store(value, if weak { Relaxed } else { order });
    }

    fn fence(&self, order: Ordering) {
        match self.weakened {
            Weakened::NoFence => {}
            Weakened::WeakFence => fence(Ordering::AcqRel),
            _ => fence(order),
        }
    }
}

/// Runs both sides in every order; whether all went well each time.
fn holds(
    weakened: Weakened,
    event_index: bool,
    prepare: fn(&Ring, bool),
    driver: fn(&Ring, bool),
    device: fn(&Ring, bool),
) -> bool {
    let slept = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let noted = Arc::clone(&slept);
    let run = move || {
        loom::model(move || {
            #[expect(clippy::arc_with_non_send_sync, reason = "loom's threads take turns")]
            let ring = Arc::new(Ring::new(weakened));
            prepare(&ring, event_index);
            let other = Arc::clone(&ring);
            let driving = loom::thread::spawn(move || driver(&other, event_index));
            device(&ring, event_index);
            driving.join().unwrap();
            if ring.slept.load(Relaxed) {
                noted.store(true, Relaxed);
            }
        });
    };
    let held = catch_unwind(AssertUnwindSafe(run)).is_ok();
    assert!(
        !held || slept.load(Relaxed),
        "no order in which a side slept"
    );
    held
}

fn kicks(weakened: Weakened, event_index: bool) -> bool {
    holds(
        weakened,
        event_index,
        Ring::device_is_busy,
        Ring::driver_adds,
        |ring, event_index| assert_eq!(ring.device_takes(event_index), 7),
    )
}

fn notifications(weakened: Weakened, event_index: bool) -> bool {
    holds(
        weakened,
        event_index,
        Ring::driver_is_busy,
        |ring, event_index| assert_eq!(ring.driver_takes_back(event_index), 9),
        Ring::device_returns,
    )
}

#[test]
fn a_device_that_goes_to_sleep_is_kicked_for_what_it_has_not_seen() {
    for event_index in [false, true] {
        assert!(kicks(Weakened::Nothing, event_index));
        for weakened in [Weakened::NoFence, Weakened::WeakFence, Weakened::Poll] {
            assert!(!kicks(weakened, event_index), "{weakened:?} {event_index}");
        }
    }
}

#[test]
fn a_driver_that_goes_to_sleep_is_notified_of_what_it_has_not_seen() {
    for event_index in [false, true] {
        assert!(notifications(Weakened::Nothing, event_index));
        for weakened in [Weakened::NoFence, Weakened::WeakFence, Weakened::Publish] {
            assert!(
                !notifications(weakened, event_index),
                "{weakened:?} {event_index}"
            );
        }
    }
}
