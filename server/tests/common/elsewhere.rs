//! A disk whose requests end on other threads: late, in any order, sometimes twice, and some only when the test says.

#![allow(clippy::unwrap_used, reason = "a helper of a test may fail the test")]
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use testkit::random::Random;
use ublkup::engine::inbox::{Inbox, Post, Ticket};
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::io::{Ring, Slot};
use ublkup::request::{IoError, Limits, Op, Progress, Request};

/// What has been read or is to be written: no other thread touches the memory of a request.
type Data = Arc<Mutex<Vec<u8>>>;

struct Job {
    is_write: bool,
    offset: usize,
    data: Data,
    ticket: Ticket,
    post: Post,
}

/// The disk.
pub struct Elsewhere {
    limits: Limits,
    held_from: usize,
    jobs: Mutex<mpsc::Sender<Job>>,
    held: Arc<Mutex<Vec<Job>>>,
}

impl Elsewhere {
    /// A disk whose requests from `held_from` on wait for [`Holder::release`]. The one for the sector before it runs into a
    /// bug.
    pub fn new(limits: Limits, held_from: usize) -> Self {
        let len = usize::try_from(limits.capacity.bytes()).unwrap();
        let (jobs, given) = mpsc::channel();
        let held = Arc::<Mutex<Vec<Job>>>::default();
        let holds = Arc::clone(&held);
        thread::spawn(move || {
            work(vec![0; len], &given, |job| {
                if job.offset < held_from {
                    return Some(job);
                }
                holds.lock().unwrap().push(job);
                None
            })
        });
        Self {
            limits,
            held_from,
            jobs: Mutex::new(jobs),
            held,
        }
    }

    /// What ends the requests that are held.
    pub fn holder(&self) -> Holder {
        Holder(Arc::clone(&self.held))
    }
}

/// The requests that are held.
pub struct Holder(Arc<Mutex<Vec<Job>>>);

impl Holder {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    /// Ends all of them.
    pub fn release(&self) {
        for job in self.0.lock().unwrap().drain(..) {
            job.post.deliver(job.ticket, 0);
        }
    }
}

/// Does jobs in any order until no more can come.
fn work(mut disk: Vec<u8>, given: &mpsc::Receiver<Job>, mut take: impl FnMut(Job) -> Option<Job>) {
    let mut random = Random(1);
    let mut waiting = Vec::new();
    let mut ended: Vec<(Post, Ticket)> = Vec::new();
    loop {
        // Lets some collect.
        match given.recv_timeout(Duration::from_micros(random.below(50))) {
            Ok(job) => waiting.extend(take(job)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if waiting.is_empty() || random.below(3) > 0 {
            continue;
        }
        let any = usize::try_from(random.below(waiting.len() as u64)).unwrap();
        let job: Job = waiting.swap_remove(any);
        let mut data = job.data.lock().unwrap();
        let range = job.offset..job.offset + data.len();
        match job.is_write {
            true => disk[range].copy_from_slice(&data),
            false => data.copy_from_slice(&disk[range]),
        }
        drop(data);
        job.post.deliver(job.ticket, 0);
        ended.push((job.post, job.ticket));
        if random.below(4) == 0 {
            // Once more, for one of the last requests: their slots are in use again, perhaps.
            let any = usize::try_from(random.below(ended.len() as u64)).unwrap();
            let (post, ticket) = &ended[any];
            post.deliver(*ticket, -libc::EIO);
        }
        if ended.len() > 16 {
            ended.remove(0);
        }
    }
}

impl StorageControl for Elsewhere {
    fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Storage for Elsewhere {
    type Queue = ElsewhereQueue;

    const RING_OPERATIONS: u32 = Inbox::RING_OPERATIONS;

    fn limits_mut(&mut self) -> &mut Limits {
        &mut self.limits
    }

    fn queue(&self, _: &mut Ring, slots: u32) -> io::Result<ElsewhereQueue> {
        Ok(ElsewhereQueue {
            bug_at: self.held_from - 512,
            jobs: self.jobs.lock().unwrap().clone(),
            inbox: Inbox::new(slots)?,
            data: (0..slots).map(|_| Data::default()).collect(),
        })
    }
}

/// One thread's access to it.
pub struct ElsewhereQueue {
    bug_at: usize,
    jobs: mpsc::Sender<Job>,
    inbox: Inbox,
    data: Box<[Data]>,
}

impl StorageQueue for ElsewhereQueue {
    fn start(&mut self, _: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        let offset = usize::try_from(request.offset_bytes()).unwrap();
        assert_ne!(offset, self.bug_at, "a bug, on purpose");
        let is_write = request.op().is_write();
        let data = Arc::clone(&self.data[slot as usize]);
        let mut bytes = data.lock().unwrap();
        bytes.resize(usize::try_from(request.len_bytes()).unwrap(), 0);
        let mut rest = &mut bytes[..];
        for part in request.buffers().memory().filter(|_| is_write) {
            let copied = part.copy_to(rest);
            rest = &mut rest[copied..];
        }
        drop(bytes);
        let job = Job {
            is_write,
            offset,
            data,
            ticket: self.inbox.expect(slot),
            post: self.inbox.post(),
        };
        self.jobs.send(job).unwrap();
        Progress::Pending
    }

    fn advance(
        &mut self,
        _: &mut Ring,
        slot: Slot,
        request: &mut Request,
        kind: u16,
        result: i32,
    ) -> Progress {
        assert_eq!(kind, 0);
        if result < 0 {
            return Progress::Done(Err(IoError::from_errno(-result)));
        }
        let bytes = self.data[slot as usize].lock().unwrap();
        let mut rest = &bytes[..];
        let is_read = request.op() == Op::Read;
        for part in request.buffers().memory().filter(|_| is_read) {
            part.copy_from(rest);
            rest = &rest[part.len()..];
        }
        Progress::Done(Ok(()))
    }

    fn next_result(&mut self) -> Option<(Slot, i32)> {
        self.inbox.next_result()
    }

    fn has_results(&self) -> bool {
        self.inbox.has_results()
    }

    fn listen(&mut self, ring: &mut Ring) -> bool {
        self.inbox.listen(ring)
    }

    fn rang(&mut self, _: &mut Ring, _kind: u16) {
        self.inbox.rang();
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        self.inbox.quiesce(limit)
    }
}
