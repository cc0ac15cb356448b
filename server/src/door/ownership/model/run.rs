//! One path through the model: what can happen, what does, and what must hold.

mod check;
mod ends;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::super::state::State;
use super::super::{Client, Identity, Lease, MemoryId, Ownership, Refused};
use super::Setup;
use super::world::{Crashed, Effect, Interrupt, SERVERS, World, Writer};
use crate::engine::StorageControl;
use crate::engine::process::Process;

/// What can happen next. Numbers are those of clients and of servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// A server starts, and recovers what is there.
    Start(usize),
    Crash(usize),
    /// A server leaves its export to another one.
    Leave(usize),
    GraceOver(usize),
    BlockWrite,
    BlockDone,
    /// A client connects to a server and starts its first vring.
    Take(usize, usize),
    Write(usize),
    Done(usize),
    /// It stops all its vrings, perhaps because it migrates.
    Stop(usize, bool),
    Resume(usize),
    /// It gets new in-flight memory, after a reset.
    NewMemory(usize),
    HangUp(usize),
    /// Its process ends.
    Kill(usize),
}

/// An action, and what comes in between.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) action: Action,
    /// Before which of its effects, and what.
    pub(super) interrupt: Option<(usize, Interrupt)>,
}

/// As many as a setup may have, and one that comes in the end.
const CLIENTS: usize = 4;
const LATE: usize = 3;

#[derive(Default)]
struct ClientState {
    lease: Option<(usize, Lease)>,
    running: bool,
    /// It has a request in flight, which a server resubmits if it died meanwhile.
    in_flight: bool,
    has_new_memory: bool,
    ended: bool,
}

/// What should be, as far as it is known from outside of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Expected {
    /// The client that has the disk of a server, or for which it is kept.
    holder: Option<usize>,
    /// It has nothing in flight, and needs no memory to come back.
    at_rest: bool,
    /// It has stopped for a migration.
    moving: bool,
    /// The server ended meanwhile: the disk is for the target.
    for_target: bool,
    succeeded: BTreeSet<usize>,
    /// A note could not be written: another client may be kept waiting, or the holder.
    unsure: bool,
}

pub(super) struct Run {
    setup: Setup,
    world: Arc<World>,
    servers: [Option<Arc<Ownership>>; SERVERS],
    clients: [ClientState; CLIENTS],
    expected: [Expected; SERVERS],
}

type Outcome<T = ()> = Result<T, String>;

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn process(client: usize) -> Process {
    Process {
        pid: i32::try_from(client).expect("there are few") + 1,
        started: 1,
    }
}

impl Run {
    pub(super) fn new(setup: Setup) -> Self {
        Self {
            setup,
            world: World::new(),
            servers: Default::default(),
            clients: Default::default(),
            expected: Default::default(),
        }
    }

    /// A path that was taken before, up to its end.
    pub(super) fn replay(setup: Setup, path: &[Step]) -> Self {
        let mut run = Self::new(setup);
        for step in path {
            run.step(*step).expect("it held the last time");
        }
        run
    }

    fn identity(&self, client: usize) -> Identity {
        let memory = MemoryId {
            device: 1,
            inode: 2 * client as u64 + u64::from(self.clients[client].has_new_memory),
        };
        Identity {
            memory: has_memory(client).then_some(memory),
            process: Some(process(client)),
        }
    }

    fn client(&self, client: usize) -> Client {
        Client {
            name: format!("client {client}"),
            gone: Arc::new(|| false),
            identity: self.identity(client),
        }
    }

    /// Whether the lease of a client is that of the server's owner.
    fn is_owner(&self, client: usize) -> bool {
        self.clients[client]
            .lease
            .as_ref()
            .is_some_and(|(server, lease)| {
                self.servers[*server]
                    .as_ref()
                    .is_some_and(|server| server.inner().owner == lease.number)
            })
    }

    pub(super) fn enabled(&self) -> Vec<Action> {
        let mut actions = Vec::new();
        let facts = self.world.facts();
        for server in 0..self.setup.servers {
            if self.servers[server].is_some() {
                actions.extend([Action::Crash(server), Action::Leave(server)]);
            } else {
                actions.push(Action::Start(server));
            }
        }
        if facts.block_write {
            actions.push(Action::BlockDone);
        } else if facts.gate_open {
            actions.push(Action::BlockWrite);
        }
        drop(facts);
        for server in 0..self.setup.servers {
            if self.world.has_timer(server) {
                actions.push(Action::GraceOver(server));
            }
        }
        for &number in self.setup.clients {
            let client = &self.clients[number];
            if client.ended {
                continue;
            }
            actions.push(Action::Kill(number));
            match &client.lease {
                None => {
                    // One of several servers is that of a client's machine.
                    let servers = match self.setup.servers {
                        1 => 0..1,
                        _ => number..number + 1,
                    };
                    let alive = servers.filter(|server| self.servers[*server].is_some());
                    actions.extend(alive.map(|server| Action::Take(number, server)));
                }
                Some(_) if client.running => {
                    actions.push(Action::HangUp(number));
                    if self.setup.resets {
                        actions.push(Action::Stop(number, false));
                    }
                    actions.push(match client.in_flight {
                        true => Action::Done(number),
                        false => Action::Write(number),
                    });
                    if self.setup.moves {
                        actions.push(Action::Stop(number, true));
                    }
                }
                Some(_) => {
                    actions.extend([Action::HangUp(number), Action::Resume(number)]);
                    // The device of a guest that is being moved is not reset.
                    let moving = self.expected[self.server_of(number)].moving;
                    if self.setup.resets && has_memory(number) && !client.has_new_memory && !moving
                    {
                        actions.push(Action::NewMemory(number));
                    }
                }
            }
        }
        actions
    }

    /// Does a step. Returns the effects that it had.
    pub(super) fn step(&mut self, step: Step) -> Outcome<Vec<Effect>> {
        let mut facts = self.world.facts();
        facts.effects.clear();
        facts.interrupt = step.interrupt;
        drop(facts);
        let done = catch_unwind(AssertUnwindSafe(|| self.act(step)));
        self.world.facts().interrupt = None;
        match done {
            Ok(done) => done?,
            Err(thrown) if thrown.is::<Crashed>() => self.crashed(step.action),
            Err(thrown) => resume_unwind(thrown),
        }
        if let Some((_, Interrupt::GraceOver)) = step.interrupt {
            (0..SERVERS).for_each(|server| self.grace_passed(server));
        }
        if let Some((_, Interrupt::Close)) = step.interrupt {
            let closed = |server: &Option<Arc<Ownership>>| {
                let state = |server: &Arc<Ownership>| matches!(server.inner().state, State::Closed);
                server.as_ref().is_some_and(state)
            };
            for server in 0..SERVERS {
                if closed(&self.servers[server]) {
                    self.leave(server);
                }
            }
        }
        self.check()?;
        Ok(self.world.facts().effects.clone())
    }

    fn act(&mut self, step: Step) -> Outcome {
        let undisturbed = step.interrupt.is_none();
        if let Some((_, Interrupt::Fail)) = step.interrupt {
            self.expected
                .iter_mut()
                .for_each(|expected| expected.unsure = true);
        }
        match step.action {
            Action::Start(server) => return self.start(server),
            Action::Crash(server) => {
                self.world.end_life(server);
                self.ended(server);
            }
            Action::Leave(server) => self.leave(server),
            Action::GraceOver(server) => {
                self.world.grace_over(server);
                self.grace_passed(server);
            }
            Action::BlockWrite => self.world.facts().block_write = true,
            Action::BlockDone => {
                let mut facts = self.world.facts();
                facts.block_write = false;
                facts.write(Writer::Block, 0, false);
            }
            Action::Take(client, server) => return self.take(client, server, undisturbed),
            Action::Write(client) => self.clients[client].in_flight = true,
            Action::Done(client) => self.finish_request(client),
            Action::Stop(client, migrates) => {
                self.finish_request(client);
                self.clients[client].running = false;
                let server = self.server_of(client);
                let expected = &mut self.expected[server];
                (expected.at_rest, expected.moving) = (!migrates, migrates);
                if let Some((_, lease)) = &self.clients[client].lease {
                    lease.rest(migrates);
                }
            }
            Action::Resume(client) => return self.resume(client, undisturbed),
            Action::NewMemory(client) => self.clients[client].has_new_memory = true,
            Action::HangUp(client) => self.hang_up(client),
            Action::Kill(client) => {
                self.clients[client].ended = true;
                self.world.facts().ended.push(process(client).pid);
                if self.clients[client].lease.is_some() {
                    self.hang_up(client);
                }
            }
        }
        Ok(())
    }

    /// No disk is kept any longer for a client that has not come back.
    fn grace_passed(&mut self, server: usize) {
        let has = |holder: usize| {
            let lease = self.clients[holder].lease.as_ref();
            lease.is_some_and(|(of, _)| *of == server) && self.is_owner(holder)
        };
        if !self.expected[server].holder.is_some_and(has) {
            self.expected[server].gone();
        }
    }

    fn server_of(&self, client: usize) -> usize {
        self.clients[client]
            .lease
            .as_ref()
            .map_or(0, |(server, _)| *server)
    }

    fn start(&mut self, server: usize) -> Outcome {
        let fake = self.world.begin_life(server);
        let grace = Duration::from_secs(3600);
        let ownership = Ownership::on(Box::new(fake.clone()), "e", false, grace);
        self.servers[server] = Some(Arc::clone(&ownership));
        self.world.facts().ownership[server] = Arc::downgrade(&ownership);
        if self.setup.moves {
            let claimed = Arc::new(fake.clone()) as Arc<dyn StorageControl>;
            ownership.allow_moves((!self.setup.block_door).then_some(claimed));
        }
        let expected = &self.expected[server];
        ensure(ownership.is_kept() || expected.holder.is_none(), || {
            format!("a server forgets {expected:?}")
        })?;
        if self.setup.block_door {
            // As `export/open.rs` does.
            self.world.facts().gate_open = !ownership.is_kept();
            ownership.open(Some(Arc::new(fake)));
        } else {
            ownership.open(None);
        }
        Ok(())
    }

    fn finish_request(&mut self, client: usize) {
        if std::mem::take(&mut self.clients[client].in_flight) {
            let server = self.server_of(client);
            let caches = self.setup.servers > 1;
            self.world
                .facts()
                .write(Writer::Client(client), server, caches);
        }
    }

    /// Whether a client may get the disk; why not.
    fn may_have(&self, client: usize, server: usize) -> Outcome {
        let expected = &self.expected[server];
        ensure(!expected.succeeded.contains(&client), || {
            format!("client {client} was succeeded, and gets the disk: {expected:?}")
        })?;
        let Some(holder) = expected.holder else {
            return Ok(());
        };
        let by_process = !has_memory(holder) || expected.at_rest;
        let cannot_return = by_process && self.clients[holder].ended;
        let may = match holder == client {
            true => !expected.for_target || !has_memory(holder) || expected.unsure,
            false => expected.moving || cannot_return,
        };
        ensure(may, || {
            format!("client {client} gets a disk that is not its own: {expected:?}")
        })
    }

    /// A client has the disk.
    fn has(&mut self, client: usize, server: usize) {
        let expected = &mut self.expected[server];
        if let Some(holder) = expected.holder.filter(|_| expected.moving)
            && holder != client
        {
            expected.succeeded.insert(holder);
        }
        expected.gone();
        expected.holder = Some(client);
    }

    fn take(&mut self, client: usize, server: usize, undisturbed: bool) -> Outcome {
        let Some(ownership) = self.servers[server].clone() else {
            return Ok(());
        };
        match ownership.take(self.client(client)) {
            Ok(lease) => {
                self.may_have(client, server)?;
                self.has(client, server);
                let state = &mut self.clients[client];
                (state.lease, state.running) = (Some((server, lease)), true);
                // What was in flight when its server died is done again.
                self.finish_request(client);
                Ok(())
            }
            Err(refused) => {
                let expected = &self.expected[server];
                let claimed = self.world.facts().claimed;
                let elsewhere = claimed.is_some_and(|claimed| claimed != server);
                let due = expected.holder == Some(client) && !expected.for_target;
                ensure(!due || !undisturbed || expected.unsure || elsewhere, || {
                    format!("client {client} does not get its disk back: {refused}")
                })
            }
        }
    }

    fn resume(&mut self, client: usize, undisturbed: bool) -> Outcome {
        let identity = self.identity(client);
        let Some((server, lease)) = self.clients[client].lease.take() else {
            return Ok(());
        };
        match lease.resume(identity) {
            Ok(true) => {
                self.clients[client].lease = Some((server, lease));
                let expected = &self.expected[server];
                ensure(expected.holder == Some(client), || {
                    format!("client {client} goes on without the disk: {expected:?}")
                })?;
                self.has(client, server);
                self.clients[client].running = true;
                Ok(())
            }
            Ok(false) => {
                drop(lease);
                self.take(client, server, undisturbed)
            }
            // The session ends.
            Err(_) => {
                self.expected[server].for_target |= self.expected[server].moving;
                drop(lease);
                Ok(())
            }
        }
    }

    /// The connection ends: the client has left if its vrings are stopped.
    fn hang_up(&mut self, client: usize) {
        self.finish_request(client);
        let is_owner = self.is_owner(client);
        let state = &mut self.clients[client];
        let stopped = !std::mem::take(&mut state.running);
        let Some((server, lease)) = state.lease.take() else {
            return;
        };
        lease.drain();
        if !stopped {
            return drop(lease);
        }
        lease.leave();
        let facts = self.world.facts();
        let holder = facts.notes[server].holder.as_ref();
        let in_a_move = holder.is_some_and(|holder| holder.moving);
        drop(facts);
        match in_a_move {
            _ if !is_owner => {}
            true => self.expected[server].for_target = true,
            false => self.expected[server].gone(),
        }
    }
}

impl Expected {
    /// No client has the disk.
    fn gone(&mut self) {
        self.holder = None;
        (self.at_rest, self.moving, self.for_target) = (false, false, false);
    }
}

/// Clients 0 and 1, and the one that comes late, have in-flight memory.
fn has_memory(client: usize) -> bool {
    client != 2
}
