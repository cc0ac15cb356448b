//! Every order in which two processors may see the ring's words: the protocol of `ring::protocol`, run by
//! loom. The words and the data are loom's, the steps are the library's own.

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

/// One that is too weak: the negative control.
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
    /// The kernel's queue of sleepers: whoever looks at the value does so under its lock.
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

    /// As an end sleeps; whether the peer has closed.
    fn sleep<F: Fence>(&self, own: &IndexPage<Modelled>, peer: &IndexPage<Modelled>, seen: u32) {
        announce_sleep::<_, F>(own, WAIT_FUTEX);
        let moved = || peer.position.load(Ordering::Acquire) != seen || has_closed(peer);
        if !moved() {
            let queue = self.futex.lock().expect("not poisoned");
            // The kernel compares the value under its lock. (In the library the sleep ends by itself after a
            // while, in case the peer closes just here; the model has no such mercy, so it compares both.)
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
            // loom complains if the consumer still looks at this place.
            // SAFETY: the place is free.
            self.cell(writer.position())
                .with_mut(|place| unsafe { *place = value + 1 });
            let seen = writer.commit::<_, F>(&self.producer, &self.consumer, 1);
            self.wake_if(seen.waiting);
        }
        self.wake_if(close::<_, F>(&self.producer, &self.consumer));
    }

    /// Until the producer has closed; the values in their order.
    fn consume<F: Fence>(&self, start: u32) -> u32 {
        let mut reader = Reader::new(SIZE, start, start).expect("valid");
        let mut last = 0;
        loop {
            // As the library does: first whether it is closed, then the last look.
            let closed = has_closed(&self.producer);
            if reader.refresh(&self.producer).expect("an honest peer") == 0 {
                if closed {
                    return last;
                }
                self.sleep::<F>(&self.consumer, &self.producer, reader.seen());
                continue;
            }
            // SAFETY: the place was published.
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
fn records_arrive_whole_and_in_order_and_nobody_sleeps_for_ever() {
    model::<Full>(0, 1);
    model::<Full>(0, 2);
}

#[test]
fn a_full_ring_and_positions_that_wrap_change_nothing() {
    model::<Full>(u32::MAX - 1, 3);
}

#[test]
fn the_model_finds_the_lost_wake_up_of_a_weaker_fence() {
    let found = std::panic::catch_unwind(|| model::<Weak>(0, 1));
    let error = found.expect_err("a weaker fence must lose a wake-up");
    let text = error.downcast_ref::<String>().map_or("", String::as_str);
    assert!(text.contains("deadlock"), "{text}");
}

/// A consumer of one record that gives its place back before it has read it, or as it should.
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
        // SAFETY: the place was published; in the mistaken order it is not ours any more.
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
fn the_model_finds_a_consumer_that_gives_a_place_back_before_it_has_read_it() {
    one_record(false);
    let found = std::panic::catch_unwind(|| one_record(true));
    assert!(found.is_err(), "reading after giving back must be found");
}
