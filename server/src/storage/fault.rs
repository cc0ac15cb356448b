//! Fault injection, for tests: requests that match a [`Rule`] get an error, or are delayed, before the storage behind
//! sees them.

use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use io_uring::{opcode, types};

use super::escape::Escape;

use crate::engine::{Changed, Fenced, RingBuffers, Sharing, Storage, StorageControl, StorageQueue};
use crate::io::{Owner, Ring, Slot, Token};
use crate::request::{IoError, Limits, Op, Progress, Request};

/// The kind of the tokens of delays; storages use smaller ones.
const WAIT: u16 = 0x8000;

/// The kind of the tokens of attempts to escape.
const ESCAPE: u16 = 0x8001;

/// A stall ends only after the longest time limit of any test.
const STALL: Duration = Duration::from_secs(3600);

/// The requests that a rule is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Any,
    Read,
    Write,
    Flush,
    Discard,
    Zeroes,
}

impl Kind {
    fn is(self, op: Op) -> bool {
        match self {
            Self::Any => true,
            Self::Read => op == Op::Read,
            Self::Write => matches!(op, Op::Write { .. }),
            Self::Flush => op == Op::Flush,
            Self::Discard => op == Op::Discard,
            Self::Zeroes => matches!(op, Op::WriteZeroes { .. }),
        }
    }
}

/// What a rule does to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fail(IoError),
    Wait(Duration),
    Escape,
    /// Makes the request cost more than it should: a system call and an allocation.
    Spend,
}

/// `OP=ACTION[@FROM-END][/EVERY][*TIMES]`: what is done to which requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    kind: Kind,
    action: Action,
    /// The first byte of the disk, and the one after the last, that a request must touch.
    range: (u64, u64),
    /// Only each Nth of the requests that match.
    every: u64,
    /// At most so many requests.
    times: u64,
}

/// A text that is not a rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a fault: write OP=ACTION[@FROM-END][/EVERY][*TIMES]")]
pub struct BadRule(String);

impl FromStr for Rule {
    type Err = BadRule;

    fn from_str(text: &str) -> Result<Self, BadRule> {
        rule(text).ok_or_else(|| BadRule(text.to_owned()))
    }
}

fn rule(text: &str) -> Option<Rule> {
    let (kind, rest) = text.split_once('=')?;
    let number = |text: Option<&str>, default| match text {
        Some(text) => text.parse().ok().filter(|number| *number > 0),
        None => Some(default),
    };
    let (rest, times) = last_part(rest, '*');
    let (rest, every) = last_part(rest, '/');
    let (action, range) = last_part(rest, '@');
    let size = |text: &str| match text {
        "0" => Some(0),
        _ => crate::request::parse_size(text).ok(),
    };
    Some(Rule {
        kind: match kind {
            "any" => Kind::Any,
            "read" => Kind::Read,
            "write" => Kind::Write,
            "flush" => Kind::Flush,
            "discard" => Kind::Discard,
            "zeroes" => Kind::Zeroes,
            _ => return None,
        },
        action: match action {
            "eio" => Action::Fail(IoError::Io),
            "enospc" => Action::Fail(IoError::NoSpace),
            "eopnotsupp" => Action::Fail(IoError::Unsupported),
            "escape" => Action::Escape,
            "spend" => Action::Spend,
            "stall" => Action::Wait(STALL),
            _ => Action::Wait(Duration::from_millis(
                action.strip_prefix("delay")?.parse().ok()?,
            )),
        },
        range: match range.map(|range| range.split_once('-')) {
            Some(range) => (size(range?.0)?, size(range?.1)?),
            None => (0, u64::MAX),
        },
        every: number(every, 1)?,
        times: number(times, u64::MAX)?,
    })
}

fn last_part(text: &str, before: char) -> (&str, Option<&str>) {
    match text.rsplit_once(before) {
        Some((rest, part)) => (rest, Some(part)),
        None => (text, None),
    }
}

/// A rule, and how many requests matched it.
#[derive(Debug)]
struct Counted {
    rule: Rule,
    matched: AtomicU64,
}

impl Counted {
    fn applies(&self, request: &Request) -> bool {
        let rule = &self.rule;
        let (first, end) = rule.range;
        let touches = match request.op() {
            Op::Flush => true,
            _ => {
                request.offset_bytes() < end && request.offset_bytes() + request.len_bytes() > first
            }
        };
        if !rule.kind.is(request.op()) || !touches {
            return false;
        }
        let number = self.matched.fetch_add(1, Ordering::Relaxed) + 1;
        number.is_multiple_of(rule.every) && number / rule.every <= rule.times
    }
}

/// A storage with fault injection.
#[derive(Debug)]
pub struct Fault<B> {
    disk: B,
    rules: Arc<[Counted]>,
}

impl<B: Storage> Fault<B> {
    /// `disk` with `rules`, of which the first that applies to a request decides.
    #[must_use]
    pub fn new(disk: B, rules: Vec<Rule>) -> Self {
        let counted = |rule| Counted {
            rule,
            matched: AtomicU64::new(0),
        };
        Self {
            disk,
            rules: rules.into_iter().map(counted).collect(),
        }
    }
}

impl<B: Storage> StorageControl for Fault<B> {
    fn limits(&self) -> &Limits {
        self.disk.limits()
    }

    fn identity(&self) -> Option<String> {
        self.disk.identity()
    }

    fn last_error(&self) -> Option<String> {
        self.disk.last_error()
    }

    fn ring_buffers(&self) -> RingBuffers {
        self.disk.ring_buffers()
    }

    fn sharing(&self) -> Option<Arc<dyn Sharing>> {
        self.disk.sharing()
    }

    fn waits_for(&self) -> Option<String> {
        self.disk.waits_for()
    }

    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        self.disk.grow(wanted_bytes)
    }

    fn cut(&self, capacity_bytes: u64) -> io::Result<()> {
        self.disk.cut(capacity_bytes)
    }

    fn claim(&self, limit: Duration) -> Result<bool, String> {
        self.disk.claim(limit)
    }

    fn on_fenced(&self, tell: Fenced) {
        self.disk.on_fenced(tell);
    }

    fn on_change(&self, tell: Changed) {
        self.disk.on_change(tell);
    }

    fn end(&self) {
        self.disk.end();
    }

    fn release(&self) {
        self.disk.release();
    }
}

impl<B: Storage> Storage for Fault<B> {
    type Queue = FaultQueue<B::Queue>;

    const RING_OPERATIONS: u32 = B::RING_OPERATIONS;

    fn limits_mut(&mut self) -> &mut Limits {
        self.disk.limits_mut()
    }

    fn queue(&self, ring: &mut Ring, slots: u32) -> io::Result<Self::Queue> {
        let waits = (0..slots).map(|_| Wait::default()).collect();
        Ok(FaultQueue {
            disk: self.disk.queue(ring, slots)?,
            rules: Arc::clone(&self.rules),
            waits,
            escape: None,
        })
    }
}

/// The delay of a slot. The kernel reads `time` when the timeout is submitted.
#[derive(Debug, Default)]
struct Wait {
    time: types::Timespec,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// No rule has been applied to the request.
    #[default]
    New,
    /// The delay is to begin when the ring has room for it.
    Due,
    /// The storage has the request.
    Passed,
}

/// One thread's access to a storage with fault injection.
#[derive(Debug)]
pub struct FaultQueue<Q> {
    disk: Q,
    rules: Arc<[Counted]>,
    waits: Box<[Wait]>,
    escape: Option<Escape>,
}

impl<Q: StorageQueue> FaultQueue<Q> {
    fn wait(&mut self, ring: &mut Ring, slot: Slot) -> Progress {
        let wait = &mut self.waits[slot as usize];
        let token = Token {
            owner: Owner::Storage,
            kind: WAIT,
            index: slot,
        };
        let sqe = opcode::Timeout::new(&raw const wait.time).build();
        // SAFETY: the time stays in its box, unchanged, until the slot is used again, which is after the completion.
        if unsafe { ring.push(sqe, token) }.is_ok() {
            Progress::Pending
        } else {
            wait.state = State::Due;
            Progress::Full
        }
    }

    /// Makes all attempts to escape that can be made at once, and the first by the ring.
    fn escape(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        match Escape::begin() {
            Ok(escape) => self.escape = Some(escape),
            Err(error) => tracing::error!(%error, "no escape is tried"),
        }
        self.escape_by_ring(ring, slot, request)
    }

    fn escape_by_ring(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        let token = Token {
            owner: Owner::Storage,
            kind: ESCAPE,
            index: slot,
        };
        let attempt = self.escape.as_mut().and_then(Escape::next);
        // SAFETY: what the entry points to stays in `escape` until all attempts have ended.
        let pushed = attempt.is_some_and(|sqe| unsafe { ring.push(sqe, token) }.is_ok());
        match pushed {
            true => Progress::Pending,
            false => self.pass(ring, slot, request),
        }
    }

    fn pass(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        self.waits[slot as usize].state = State::Passed;
        let progress = self.disk.start(ring, slot, request);
        self.note(slot, progress)
    }

    /// Frees the slot when its request is done.
    fn note(&mut self, slot: Slot, progress: Progress) -> Progress {
        if matches!(progress, Progress::Done(_)) {
            self.waits[slot as usize].state = State::New;
        }
        progress
    }
}

impl<Q: StorageQueue> StorageQueue for FaultQueue<Q> {
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        match self.waits[slot as usize].state {
            State::Passed => return self.pass(ring, slot, request),
            State::Due => return self.wait(ring, slot),
            State::New => {}
        }
        let rule = self.rules.iter().find(|rule| rule.applies(request));
        match rule.map(|counted| counted.rule.action) {
            None => self.pass(ring, slot, request),
            Some(Action::Fail(error)) => Progress::Done(Err(error)),
            Some(Action::Escape) => self.escape(ring, slot, request),
            Some(Action::Spend) => {
                std::hint::black_box(Box::new(rustix::thread::gettid()));
                self.pass(ring, slot, request)
            }
            Some(Action::Wait(time)) => {
                self.waits[slot as usize].time = time.into();
                self.wait(ring, slot)
            }
        }
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        kind: u16,
        result: i32,
    ) -> Progress {
        if kind == WAIT {
            // The delay is over, or was cancelled by a thread that ends.
            return self.pass(ring, slot, request);
        }
        if kind == ESCAPE {
            if let Some(escape) = &self.escape {
                escape.ended(result);
            }
            return self.escape_by_ring(ring, slot, request);
        }
        let progress = self.disk.advance(ring, slot, request, kind, result);
        self.note(slot, progress)
    }

    fn abandon(&mut self) {
        self.disk.abandon();
    }

    fn next_result(&mut self) -> Option<(Slot, i32)> {
        self.disk.next_result()
    }

    fn has_results(&self) -> bool {
        self.disk.has_results()
    }

    fn listen(&mut self, ring: &mut Ring) -> bool {
        self.disk.listen(ring)
    }

    fn rang(&mut self, ring: &mut Ring, kind: u16) {
        self.disk.rang(ring, kind);
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        self.disk.quiesce(limit)
    }
}
