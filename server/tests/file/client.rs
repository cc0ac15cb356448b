//! A client that works a backend as a queue thread does: several requests at once, a backlog for
//! those that did not fit.

use std::collections::VecDeque;

use testkit::random::Random;
use ublkup::engine::{Storage, StorageControl, StorageQueue};
use ublkup::io::{Completion, Ring, Slot};
use ublkup::request::{Buffer, Buffers, Limits, Op, Outcome, Progress, Request};
use ublkup::storage::File;

/// How the memory of a request lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One buffer, from the beginning of a page.
    Aligned,
    /// One buffer per sector, from the beginning of a page.
    Sectors,
    /// Three buffers of odd lengths at an odd address.
    Odd,
}

impl Shape {
    pub fn any(random: &mut Random) -> Self {
        [Self::Aligned, Self::Sectors, Self::Odd][random.index(3)]
    }
}

/// The memory of a request: data between two zones that must stay as they are.
struct Memory {
    pages: Vec<u8>,
    start: usize,
    len: usize,
    list: Vec<Buffer>,
}

const GUARD: u8 = 0xa5;

impl Memory {
    fn new(data: &[u8], shape: Shape) -> Self {
        let mut pages = vec![GUARD; data.len() + 3 * 4096];
        let page = pages.as_ptr().addr().next_multiple_of(4096) - pages.as_ptr().addr();
        let start = page + 4096 + if shape == Shape::Odd { 13 } else { 0 };
        let len = data.len();
        pages[start..start + len].copy_from_slice(data);
        let cuts = match shape {
            Shape::Aligned => vec![0, len],
            Shape::Sectors => (0..=len).step_by(512).collect(),
            Shape::Odd => vec![0, (len / 3 + 1).min(len), (len / 2 + 7).min(len), len],
        };
        let base = pages.as_mut_ptr().wrapping_add(start);
        let list = cuts
            .windows(2)
            .map(|cut| Buffer {
                iov_base: base.wrapping_add(cut[0]).cast(),
                iov_len: cut[1] - cut[0],
            })
            .collect();
        Self {
            pages,
            start,
            len,
            list,
        }
    }
}

/// A request that ended.
pub struct Ended {
    pub slot: Slot,
    pub outcome: Outcome,
    memory: Memory,
}

impl Ended {
    /// What the buffers hold.
    pub fn data(&self) -> &[u8] {
        let (before, rest) = self.memory.pages.split_at(self.memory.start);
        let (data, after) = rest.split_at(self.memory.len);
        let guards = before.iter().chain(after);
        assert!(
            guards.copied().all(|byte| byte == GUARD),
            "written outside the buffers"
        );
        data
    }
}

pub struct Client {
    ring: Ring,
    queue: <File as Storage>::Queue,
    limits: Limits,
    running: Vec<Option<(Request, Memory)>>,
    backlog: VecDeque<Slot>,
    backlog_was_used: bool,
    ended: Vec<Ended>,
}

impl Client {
    pub fn new(disk: &File, slots: u32) -> Self {
        let mut ring = Ring::new(slots + 2).unwrap();
        let queue = disk.queue(&mut ring, slots).unwrap();
        Self {
            ring,
            queue,
            limits: disk.limits().clone(),
            running: (0..slots).map(|_| None).collect(),
            backlog: VecDeque::new(),
            backlog_was_used: false,
            ended: Vec::new(),
        }
    }

    pub fn backlog_was_used(&self) -> bool {
        self.backlog_was_used
    }

    /// Starts a request with a copy of `data` as its memory.
    pub fn submit(&mut self, slot: u64, op: Op, at: u64, len: u64, data: &[u8], shape: Shape) {
        let range = self.limits.check(op, at / 512, len / 512).unwrap();
        let mut memory = Memory::new(if op.has_data() { data } else { &[] }, shape);
        let buffers = match op.has_data() {
            // SAFETY: heap memory that stays where it is in `running` until the request ended.
            true => unsafe { Buffers::from_list(&mut memory.list) },
            false => Buffers::NONE,
        };
        let slot = Slot::try_from(slot).unwrap();
        let entry = &mut self.running[slot as usize];
        assert!(entry.is_none());
        *entry = Some((Request::new(op, range, buffers), memory));
        if self.backlog.is_empty() {
            self.start(slot);
        } else {
            self.backlog.push_back(slot);
        }
    }

    /// Waits for everything that was started.
    pub fn finish_all(&mut self) -> Vec<Ended> {
        let mut batch: Vec<Completion> = Vec::with_capacity(64);
        while self.running.iter().any(Option::is_some) {
            assert!(
                self.ring.in_flight() > 0,
                "requests wait and nothing will wake them"
            );
            self.ring.submit_and_wait(1).unwrap();
            self.ring.reap(&mut batch);
            for completion in batch.drain(..) {
                let slot = completion.token.index;
                let request = &mut self.running[slot as usize].as_mut().unwrap().0;
                let progress = self.queue.advance(
                    &mut self.ring,
                    slot,
                    request,
                    completion.token.kind,
                    completion.result,
                );
                self.settle(slot, progress);
            }
            for _ in 0..self.backlog.len() {
                let slot = self.backlog.pop_front().unwrap();
                if !self.start(slot) {
                    self.backlog.rotate_right(1);
                    break;
                }
            }
        }
        std::mem::take(&mut self.ended)
    }

    /// One request, from beginning to end; `data` holds the buffers' content afterwards.
    pub fn one(&mut self, op: Op, at: u64, data: &mut [u8], shape: Shape) -> Outcome {
        self.submit(0, op, at, data.len() as u64, data, shape);
        let ended = self.finish_all().remove(0);
        data.copy_from_slice(ended.data());
        ended.outcome
    }

    /// Writes `data`.
    pub fn write(&mut self, at: u64, data: &[u8], shape: Shape) -> Outcome {
        self.submit(
            0,
            Op::Write { fua: true },
            at,
            data.len() as u64,
            data,
            shape,
        );
        self.finish_all().remove(0).outcome
    }

    /// What is there.
    pub fn read(&mut self, at: u64, len: usize, shape: Shape) -> Vec<u8> {
        let mut data = vec![0xee; len];
        self.one(Op::Read, at, &mut data, shape).unwrap();
        data
    }

    /// One request without data.
    pub fn range(&mut self, op: Op, at: u64, len: u64) -> Outcome {
        self.submit(0, op, at, len, &[], Shape::Aligned);
        self.finish_all().remove(0).outcome
    }

    fn start(&mut self, slot: Slot) -> bool {
        let request = &mut self.running[slot as usize].as_mut().unwrap().0;
        let progress = self.queue.start(&mut self.ring, slot, request);
        self.settle(slot, progress)
    }

    fn settle(&mut self, slot: Slot, progress: Progress) -> bool {
        match progress {
            Progress::Pending => {}
            Progress::Full => {
                self.backlog.push_back(slot);
                self.backlog_was_used = true;
                return false;
            }
            Progress::Done(outcome) => {
                let (request, memory) = self.running[slot as usize].take().unwrap();
                request.finish();
                self.ended.push(Ended {
                    slot,
                    outcome,
                    memory,
                });
            }
        }
        true
    }
}
