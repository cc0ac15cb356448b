//! What is around ownership in the model: what outlives a server, and what a server does to it. Each
//! effect is a place where the server may be interrupted.

use std::io;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::super::note::{Machine, Note};
use super::super::{BlockDoor, Ownership};
use crate::engine::StorageControl;
use crate::engine::process::Process;
use crate::request::Limits;

/// What is thrown where a server dies.
pub(super) struct Crashed;

/// What a server does to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Effect {
    Note,
    CloseGate,
    OpenGate,
    Claim,
    Release,
}

/// What happens just before an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Interrupt {
    /// The server dies.
    Crash,
    /// The effect fails.
    Fail,
    /// The export is closed, to be left to another server.
    Close,
    /// The time of all waits is over.
    GraceOver,
}

impl Interrupt {
    pub(super) const ALL: [Self; 4] = [Self::Crash, Self::Fail, Self::Close, Self::GraceOver];

    pub(super) fn can_meet(self, effect: Effect) -> bool {
        use Effect::{Claim, CloseGate, Note, OpenGate, Release};
        match self {
            Self::Crash => true,
            Self::Fail => matches!(effect, Note | CloseGate | Claim),
            // Where no lock is held, and another thread could do it.
            Self::Close | Self::GraceOver => match effect {
                CloseGate | Claim | Release => true,
                Note | OpenGate => false,
            },
        }
    }
}

/// A party that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Writer {
    Nobody,
    Block,
    Client(usize),
}

pub(super) const SERVERS: usize = 2;

pub(super) struct Facts {
    pub(super) notes: [Note; SERVERS],
    /// Whether the ublk door accepts writes, and has accepted one that is not complete.
    pub(super) gate_open: bool,
    pub(super) block_write: bool,
    /// The server that has the storage, where it is claimed while a client has the disk.
    pub(super) claimed: Option<usize>,
    /// The last write, as it is in the storage, and as it is only in the page cache of a server's host.
    pub(super) disk: Writer,
    pub(super) cached: [Option<Writer>; SERVERS],
    /// The last write that was acknowledged.
    pub(super) acknowledged: Writer,
    /// Which of its lives each server lives.
    pub(super) lives: [Option<u32>; SERVERS],
    pub(super) ownership: [Weak<Ownership>; SERVERS],
    last_life: u32,
    timers: Vec<(usize, Box<dyn FnOnce() + Send>)>,
    /// Processes that have ended, by number.
    pub(super) ended: Vec<i32>,
    pub(super) effects: Vec<Effect>,
    pub(super) interrupt: Option<(usize, Interrupt)>,
}

pub(super) struct World(Mutex<Facts>);

impl World {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Facts {
            notes: Default::default(),
            gate_open: false,
            block_write: false,
            claimed: None,
            disk: Writer::Nobody,
            cached: [None; SERVERS],
            acknowledged: Writer::Nobody,
            lives: [None; SERVERS],
            ownership: Default::default(),
            last_life: 0,
            timers: Vec::new(),
            ended: Vec::new(),
            effects: Vec::new(),
            interrupt: None,
        })))
    }

    pub(super) fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new life of a server.
    pub(super) fn begin_life(self: &Arc<Self>, server: usize) -> Fake {
        let mut facts = self.facts();
        facts.last_life += 1;
        let life = facts.last_life;
        facts.lives[server] = Some(life);
        drop(facts);
        Fake {
            world: Arc::clone(self),
            server,
            life,
        }
    }

    /// The process of a server is gone, and with it its lock. Its host writes out what is cached.
    pub(super) fn end_life(&self, server: usize) {
        let mut facts = self.facts();
        facts.lives[server] = None;
        facts.gate_open = false;
        facts.block_write = false;
        facts.timers.retain(|(of, _)| *of != server);
        facts.flush(server);
        if facts.claimed == Some(server) {
            facts.claimed = None;
        }
    }

    pub(super) fn has_timer(&self, server: usize) -> bool {
        self.facts().timers.iter().any(|(of, _)| *of == server)
    }

    pub(super) fn grace_over(&self, server: usize) {
        let mut facts = self.facts();
        let timers = std::mem::take(&mut facts.timers);
        let (due, rest) = timers.into_iter().partition(|(of, _)| *of == server);
        facts.timers = rest;
        drop(facts);
        let due: Vec<(usize, Box<dyn FnOnce() + Send>)> = due;
        due.into_iter().for_each(|(_, callback)| callback());
    }
}

impl Facts {
    fn flush(&mut self, server: usize) {
        if let Some(writer) = self.cached[server].take() {
            self.disk = writer;
        }
    }

    /// A write is applied and acknowledged. `caches`: it stays in a page cache until that is flushed.
    pub(super) fn write(&mut self, writer: Writer, server: usize, caches: bool) {
        match caches {
            true => self.cached[server] = Some(writer),
            false => self.disk = writer,
        }
        self.acknowledged = writer;
    }

    /// What is read through a server.
    pub(super) fn read(&self, server: usize) -> Writer {
        self.cached[server].unwrap_or(self.disk)
    }
}

/// The machine, the ublk door and the storage of one life of a server. After that it does nothing.
#[derive(Clone)]
pub(super) struct Fake {
    world: Arc<World>,
    server: usize,
    life: u32,
}

impl Fake {
    /// Comes before each effect. Returns the facts to change, unless the server is dead or the effect fails.
    fn effect(&self, effect: Effect) -> Option<MutexGuard<'_, Facts>> {
        let mut facts = self.world.facts();
        if facts.lives[self.server] != Some(self.life) {
            return None;
        }
        facts.effects.push(effect);
        let number = facts.effects.len() - 1;
        let due = facts.interrupt.filter(|(at, _)| *at == number);
        match due {
            None => Some(facts),
            Some((_, Interrupt::Fail)) => None,
            Some((_, Interrupt::Crash)) => {
                drop(facts);
                self.world.end_life(self.server);
                resume_unwind(Box::new(Crashed))
            }
            Some((_, Interrupt::Close)) => {
                let ownership = facts.ownership[self.server].upgrade();
                drop(facts);
                if let Some(ownership) = ownership {
                    ownership.close();
                }
                Some(self.world.facts())
            }
            Some((_, Interrupt::GraceOver)) => {
                drop(facts);
                self.world.grace_over(self.server);
                Some(self.world.facts())
            }
        }
    }
}

impl Machine for Fake {
    fn read_note(&self) -> Note {
        self.world.facts().notes[self.server].clone()
    }

    fn write_note(&self, note: &Note) -> io::Result<()> {
        match self.effect(Effect::Note) {
            Some(mut facts) => {
                facts.notes[self.server] = note.clone();
                Ok(())
            }
            None => Err(io::Error::other("no room")),
        }
    }

    /// The end of the wait does not keep it from being called: it may have begun before.
    fn call_after(
        &self,
        _: Duration,
        callback: Box<dyn FnOnce() + Send>,
    ) -> io::Result<Box<dyn Send>> {
        let mut facts = self.world.facts();
        if facts.lives[self.server] == Some(self.life) {
            facts.timers.push((self.server, callback));
        }
        Ok(Box::new(()))
    }

    fn is_running(&self, process: Process) -> bool {
        !self.world.facts().ended.contains(&process.pid)
    }
}

impl BlockDoor for Fake {
    fn close(&self, _: Duration) -> Result<(), String> {
        let mut facts = self.effect(Effect::CloseGate).ok_or("stuck")?;
        if std::mem::take(&mut facts.block_write) {
            facts.write(Writer::Block, self.server, false);
        }
        facts.gate_open = false;
        Ok(())
    }

    fn open(&self) {
        if let Some(mut facts) = self.effect(Effect::OpenGate) {
            facts.gate_open = true;
        }
    }

    fn in_use(&self) -> Option<String> {
        None
    }
}

impl StorageControl for Fake {
    fn limits(&self) -> &Limits {
        unreachable!("ownership does not ask for limits")
    }

    fn claim(&self, _: Duration) -> Result<bool, String> {
        let mut facts = self.effect(Effect::Claim).ok_or("cannot lock")?;
        match facts.claimed {
            Some(server) if server != self.server => Err("another server has it".into()),
            _ => Ok(facts.claimed.replace(self.server).is_none()),
        }
    }

    fn release(&self) {
        if self.world.facts().claimed != Some(self.server) {
            return;
        }
        if let Some(mut facts) = self.effect(Effect::Release) {
            facts.flush(self.server);
            facts.claimed = None;
        }
    }
}
