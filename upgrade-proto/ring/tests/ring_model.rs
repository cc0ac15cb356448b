//! The code of `fd_ring::protocol` in every order in which two processors may see its loads and stores, by loom.
//! The words and the data are loom's types.

use std::sync::atomic::Ordering;

use fd_ring::protocol::{
    Cursor, Fence, IndexPage, Reader, WAIT_FUTEX, Word, Writer, announce_awake, announce_sleep,
    close, has_closed,
};
use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicU32;
use loom::sync::{Arc, Condvar, Mutex};

#[derive(Default)]
struct Modelled(AtomicU32);

impl Word for Modelled {
    fn load(&self, order: Ordering) -> u32 {
        self.0.load(order)
    }

    fn store(&self, value: u32, order: Ordering) {
        self.0.store(value, order);
    }
}

/// The fence of the library.
struct Full;

impl Fence for Full {
    fn full() {
        loom::sync::atomic::fence(Ordering::SeqCst);
    }
}

/// A fence that is too weak, as the negative control.
struct Weak;

impl Fence for Weak {
    fn full() {
        loom::sync::atomic::fence(Ordering::AcqRel);
    }
}

const SIZE: u32 = 2;

/// Shared by the two ends: their pages, the data, and a futex for each position.
struct Ring {
    producer: IndexPage<Modelled>,
    consumer: IndexPage<Modelled>,
    data: [UnsafeCell<u32>; SIZE as usize],
    /// The kernel's queue of sleepers; the futex's value is compared under this lock.
    futex: Mutex<()>,
    wake: Condvar,
}

impl Ring {
    fn new(start: u32) -> Arc<Self> {
        let at = |position: u32| {
            let page: IndexPage<Modelled> = IndexPage::default();
            page.position.store(position, Ordering::Relaxed);
            page
        };
        Arc::new(Self {
            producer: at(start),
            consumer: at(start),
            data: [UnsafeCell::new(0), UnsafeCell::new(0)],
            futex: Mutex::new(()),
            wake: Condvar::new(),
        })
    }

    fn cell(&self, position: u32) -> &UnsafeCell<u32> {
        &self.data[(position % SIZE) as usize]
    }

    fn wake_if(&self, waiting: u32) {
        if waiting & WAIT_FUTEX != 0 {
            let _queue = self.futex.lock().expect("not poisoned");
            self.wake.notify_all();
        }
    }

    /// Sleeps as an end of a ring does.
    fn sleep<F: Fence>(&self, own: &IndexPage<Modelled>, peer: &IndexPage<Modelled>, seen: u32) {
        announce_sleep::<_, F>(own, WAIT_FUTEX);
        let moved = || peer.position.load(Ordering::Acquire) != seen || has_closed(peer);
        if !moved() {
            let queue = self.futex.lock().expect("not poisoned");
            // The kernel compares the value under its lock. The library has a timeout for a peer that closes just
            // now; the model has none, and so compares both words.
            if !moved() {
                drop(self.wake.wait(queue).expect("not poisoned"));
            }
        }
        announce_awake(own);
    }

    fn produce<F: Fence>(&self, start: u32, count: u32) {
        let mut writer = Writer::new(SIZE, start, start).expect("valid");
        for value in 0..count {
            while writer.refresh(&self.consumer).expect("an honest peer") == 0 {
                self.sleep::<F>(&self.producer, &self.consumer, writer.seen());
            }
            // loom reports it if the consumer still reads there.
            // SAFETY: the slot is free.
            self.cell(writer.position())
                .with_mut(|place| unsafe { *place = value + 1 });
            let seen = writer.commit::<_, F>(&self.producer, &self.consumer, 1);
            self.wake_if(seen.waiting);
        }
        self.wake_if(close::<_, F>(&self.producer, &self.consumer));
    }

    /// Reads values, which must be in order, until the producer has closed; returns the last one.
    fn consume<F: Fence>(&self, start: u32) -> u32 {
        let mut reader = Reader::new(SIZE, start, start).expect("valid");
        let mut last = 0;
        loop {
            // As in the library: whether it is closed must be known before the position is loaded.
            let closed = has_closed(&self.producer);
            if reader.refresh(&self.producer).expect("an honest peer") == 0 {
                if closed {
                    return last;
                }
                self.sleep::<F>(&self.consumer, &self.producer, reader.seen());
                continue;
            }
            // SAFETY: the slot was published.
            let value = self.cell(reader.position()).with(|place| unsafe { *place });
            assert_eq!(value, last + 1, "a record is lost, doubled or torn");
            last = value;
            reader.consume(1);
            let seen = reader.publish::<_, F>(&self.consumer, &self.producer);
            self.wake_if(seen.waiting);
        }
    }
}

fn model<F: Fence>(start: u32, count: u32) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let ring = Ring::new(start);
        let producing = Arc::clone(&ring);
        let producer = loom::thread::spawn(move || producing.produce::<F>(start, count));
        assert_eq!(
            ring.consume::<F>(start),
            count,
            "the last record was missed"
        );
        producer.join().expect("the producer ends");
    });
}

#[test]
fn records_arrive_whole_and_in_order_and_no_wake_up_is_lost() {
    model::<Full>(0, 1);
    model::<Full>(0, 2);
}

#[test]
fn a_full_ring_and_positions_that_wrap_change_nothing() {
    model::<Full>(u32::MAX - 1, 3);
}

#[test]
fn a_weaker_fence_loses_a_wake_up_and_the_model_finds_it() {
    let found = std::panic::catch_unwind(|| model::<Weak>(0, 1));
    let error = found.expect_err("a weaker fence must lose a wake-up");
    let text = error.downcast_ref::<String>().map_or("", String::as_str);
    assert!(text.contains("deadlock"), "{text}");
}

/// A consumer of one record that publishes its position before it has read the data, if `mistaken`.
fn one_record(mistaken: bool) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(move || {
        let ring = Ring::new(0);
        let producing = Arc::clone(&ring);
        let producer = loom::thread::spawn(move || producing.produce::<Full>(0, 3));
        let mut reader = Reader::new(SIZE, 0, 0).expect("valid");
        while reader.refresh(&ring.producer).expect("an honest peer") == 0 {
            ring.sleep::<Full>(&ring.consumer, &ring.producer, reader.seen());
        }
        let cell = ring.cell(reader.position());
        // SAFETY: the slot was published; in the mistaken order it is the producer's again, which loom must report.
        let read = || cell.with(|place| unsafe { std::ptr::read(place) });
        if !mistaken {
            read();
        }
        reader.consume(1);
        let seen = reader.publish::<_, Full>(&ring.consumer, &ring.producer);
        ring.wake_if(seen.waiting);
        if mistaken {
            read();
        }
        producer.join().expect("the producer ends");
    });
}

#[test]
fn a_consumer_that_publishes_before_it_has_read_is_found() {
    one_record(false);
    let found = std::panic::catch_unwind(|| one_record(true));
    assert!(found.is_err(), "reading after publishing must be found");
}
