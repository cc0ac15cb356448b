//! A driver and the memory of its guest, which changes whenever the driver likes: between two steps of the server, and
//! between two of its accesses.
//!
//! What must hold, whatever the driver does: the storage gets only ranges of the disk and memory of the guest; each chain
//! is answered once; a vring stops when it is told to and leaves nothing on the thread's ring; no byte beside the
//! guest's memory changes.

mod driver;
mod world;

use ublkup::door::vhost::testing::{
    GuestMemory, PageLog, Queues, RecordQueue, Vring, at_each_access,
};
use ublkup::io::{Ring, Slot};
use ublkup::request::{IoError, Op, Outcome, Request};
use vm_memory::VolatileSlice;

use crate::Script;
use driver::{Driver, MAX_QUEUE};
use world::{AVAILABLE, DESCRIPTORS, USED, World, user};

/// Size of the disk.
const DISK_BYTES: u64 = 1 << 20;

/// Steps of one input, at most.
const MAX_STEPS: usize = 256;

/// Attempts after which something that must end has not.
const MANY: usize = 100_000;

/// The features of a driver, each with one bit of a byte: event index, indirect descriptors, flush, cache mode, discard,
/// write-zeroes, version 1.
const FEATURES: [u32; 7] = [29, 28, 9, 11, 13, 14, 32];

/// Runs one input.
pub fn run(input: &[u8]) {
    World::with(|world, ring| {
        let mut machine = Machine::new(world, Script::new(input));
        machine.run(ring);
        machine.end(ring);
        assert_eq!(ring.in_flight(), 0, "operations are left on the ring");
        world.check();
    });
}

/// A request that the storage has not answered.
type Kept = (Slot, Request);

struct Machine<'a> {
    world: &'a World,
    script: Script<'a>,
    queues: Queues,
    driver: Driver<'a>,
    memory: GuestMemory,
    log: Option<PageLog>,
    kept: Vec<Kept>,
    started: bool,
    with_record: bool,
}

impl<'a> Machine<'a> {
    fn new(world: &'a World, mut script: Script<'a>) -> Self {
        let driver = Driver::new(world, &mut script);
        let bits = script.u8();
        Self {
            queues: Queues::new(world.limits.clone()).expect("descriptors"),
            memory: world.maps[0].clone(),
            log: (bits & 1 != 0).then(|| world.logs[usize::from(bits >> 1 & 1)].clone()),
            with_record: bits & 4 != 0,
            kept: Vec::new(),
            started: false,
            world,
            script,
            driver,
        }
    }

    fn run(&mut self, ring: &mut Ring) {
        self.start(ring);
        for _ in 0..MAX_STEPS {
            if self.script.is_over() {
                break;
            }
            self.step(ring);
        }
    }

    fn step(&mut self, ring: &mut Ring) {
        let script = &mut self.script;
        match script.u8() % 16 {
            0..=2 => self.driver.make_available(script),
            3..=4 => self.round(ring),
            5 => self.driver.change(script),
            6 => self.driver.change_at_access(script),
            7 => self.driver.kick(),
            8 => self.finish_one(ring),
            9 => {
                self.queues.listen(ring);
            }
            10 => self.use_memory(ring),
            11 if self.started => {
                let on = self.script.bool();
                self.queues.enable(ring, 0, on);
            }
            12 if self.started => {
                self.stop(ring);
                self.start(ring);
            }
            13 if self.started => {
                let call = self.script.bool().then(driver::signal);
                self.queues.call(ring, 0, call);
            }
            14 if self.started => {
                let at = self.script.bool().then(|| world::guest(USED));
                self.queues.log_used(ring, 0, at);
            }
            _ => self.take_completions(ring),
        }
    }

    /// Starts the vring, as a session does: with a record or without, and only one at a time.
    fn start(&mut self, ring: &mut Ring) {
        let record = self.with_record.then(|| self.record());
        let vring = Vring {
            index: 0,
            size: self.driver.size,
            descriptors: user(DESCRIPTORS),
            available: user(AVAILABLE),
            used: user(USED),
            base: self.driver.base,
            features: self.driver.features,
            kick: self.driver.new_kick(),
            call: Some(driver::signal()),
            error: Some(self.driver.new_error()),
            used_guest: self.log.is_some().then(|| world::guest(USED)),
            record,
        };
        let log = self.log.as_ref();
        self.started = self.queues.start(ring, vring, &self.memory, log);
    }

    fn record(&self) -> RecordQueue {
        let record = self.world.record.queue(0, self.driver.size);
        record.expect("room for the ring")
    }

    /// Other memory, or another log, as a session has it: a log that covers all memory.
    fn use_memory(&mut self, ring: &mut Ring) {
        let which = self.script.u8();
        self.memory = self.world.maps[usize::from(which) % self.world.maps.len()].clone();
        self.log = match which >> 4 & 3 {
            0 => None,
            n => Some(self.world.logs[usize::from(n & 1)].clone()),
        };
        self.queues
            .use_memory(ring, &self.memory, self.log.as_ref());
    }

    /// What a queue thread does in one round. What becomes of each request is the script's choice.
    fn round(&mut self, ring: &mut Ring) {
        let what = self.script.u8();
        for number in 0_u32.. {
            assert!(number <= 4 * u32::from(MAX_QUEUE), "a round without an end");
            let Some((slot, request)) = self.queues.next(ring) else {
                break;
            };
            self.check(&request);
            match what.rotate_left(2 * (number % 4)) & 3 {
                0 | 1 => self.answer(ring, slot, request, Ok(())),
                2 => self.answer(ring, slot, request, Err(IoError::Io)),
                _ => self.kept.push((slot, request)),
            }
        }
        self.queues.end_batch(ring);
    }

    /// A storage may rely on this.
    fn check(&self, request: &Request) {
        let end = request.offset_bytes().checked_add(request.len_bytes());
        assert!(end.is_some_and(|end| end <= DISK_BYTES), "{request:?}");
        assert!(request.offset_bytes().is_multiple_of(512), "{request:?}");
        let mut len_bytes = 0;
        for buffer in request.buffers().list() {
            let inside = self.memory.contains(buffer.iov_base.cast(), buffer.iov_len);
            assert!(inside, "memory that is not the guest's: {request:?}");
            len_bytes += buffer.iov_len as u64;
        }
        if let Op::Read | Op::Write { .. } = request.op() {
            assert!(
                len_bytes == request.len_bytes() && len_bytes > 0,
                "{request:?}"
            );
        }
    }

    /// Moves the data and answers.
    fn answer(&mut self, ring: &mut Ring, slot: Slot, request: Request, outcome: Outcome) {
        let pattern = [0xa5; 512];
        for part in request.buffers().memory() {
            match request.op() {
                Op::Read => part.copy_from(&pattern),
                _ => drop(copied(part)),
            }
        }
        self.queues.complete(ring, slot, request, outcome);
    }

    fn finish_one(&mut self, ring: &mut Ring) {
        let which = usize::from(self.script.u8());
        if self.kept.is_empty() {
            return;
        }
        let (slot, request) = self.kept.swap_remove(which % self.kept.len());
        let outcome = match which & 0x80 {
            0 => Ok(()),
            _ => Err(IoError::NoSpace),
        };
        self.answer(ring, slot, request, outcome);
        self.queues.end_batch(ring);
    }

    fn take_completions(&mut self, ring: &mut Ring) {
        let taken = self.queues.take_completions(ring, 0);
        taken.expect("the ring is whole");
    }

    /// The rest of what is in flight ends.
    fn finish_all(&mut self, ring: &mut Ring) {
        while let Some((slot, request)) = self.kept.pop() {
            self.answer(ring, slot, request, Ok(()));
        }
    }

    /// Stops the vring; it goes on there.
    fn stop(&mut self, ring: &mut Ring) {
        let stopping = self.queues.stop(ring, 0);
        let base = (0..MANY).find_map(|_| {
            self.finish_all(ring);
            while let Some((slot, request)) = self.queues.next(ring) {
                self.check(&request);
                self.answer(ring, slot, request, Ok(()));
            }
            self.queues.end_batch(ring);
            self.take_completions(ring);
            stopping.base()
        });
        let base = base.expect("the vring does not stop");
        self.started = false;
        self.driver.check_stopped(base, self.with_record);
        self.driver.base = base;
    }

    fn end(&mut self, ring: &mut Ring) {
        self.driver.forget_changes();
        if self.started {
            self.stop(ring);
        }
        self.finish_all(ring);
        self.queues.exit(ring);
        let ended = (0..MANY).any(|_| {
            let ended = self.queues.end_batch(ring) == ublkup::engine::Next::Exit;
            self.take_completions(ring);
            ended
        });
        assert!(ended, "the queues do not end");
        // A cancellation may complete after what it cancelled.
        for _ in 0..MANY {
            if ring.in_flight() == 0 {
                break;
            }
            self.take_completions(ring);
        }
    }
}

/// The memory is read, all of it.
fn copied(part: VolatileSlice<'_>) -> Vec<u8> {
    let mut bytes = vec![0; part.len()];
    part.copy_to(&mut bytes[..]);
    bytes
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        at_each_access(None);
    }
}
