//! A server from its readiness to the end of its last export: what it does about events.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::Scope;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use sd_notify::NotifyState;

use super::manager::Manager;
use super::output::count;
use super::signals;
use crate::engine::events::{self, What};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{Addition, Answer, Door, Event, Export, Server, Watch, explain};

/// How long an export may take to end before the log says what it waits for, and how often it says so again.
const PATIENCE: Duration = Duration::from_secs(3);
const REMINDER: Duration = Duration::from_secs(30);

/// How exports end.
type How = fn(Export) -> bool;

/// What a server needs while it serves.
pub(super) struct Service<'a> {
    pub(super) dir: &'a RuntimeDir,
    pub(super) server: &'a Arc<Server>,
    pub(super) inbox: &'a mpsc::Receiver<Event>,
    pub(super) manager: &'a Manager,
}

/// The exports of a server.
struct Exports {
    serving: BTreeMap<String, Export>,
    /// Those that are being ended, by the number of the thread that does it.
    ending: BTreeMap<u64, (String, Watch)>,
    last_end: u64,
    /// How many are being started.
    starting: usize,
    /// How those end that are started after all others were told to.
    how_all_end: Option<How>,
    /// What happened to exports that are being started.
    early: Vec<Event>,
    in_order: bool,
}

/// A thread that starts an export: tells the server when it ends.
struct Beginning(Arc<Server>);

impl Drop for Beginning {
    fn drop(&mut self) {
        // The receiver waits for this.
        let _ = self.0.events().send(Event::Added);
    }
}

/// An export that was added, or why it could not be, and who waits for it.
type Started = (Result<Export>, Answer);

impl Service<'_> {
    /// Serves until the last export has ended; returns whether none lost a door before that, and all requests ended. Each
    /// export begins and drains in a thread of its own, so that the others are served meanwhile.
    ///
    /// # Errors
    ///
    /// None that can happen: events go on arriving.
    pub(super) fn until_the_end(&self, serving: BTreeMap<String, Export>) -> Result<bool> {
        let mut exports = Exports {
            serving,
            ending: BTreeMap::new(),
            last_end: 0,
            starting: 0,
            how_all_end: None,
            early: Vec::new(),
            in_order: true,
        };
        let (begun, started) = mpsc::channel();
        // Confined or not, it is what it will be.
        self.server.take_exports(true);
        let in_order = std::thread::scope(|scope| {
            while !exports.serving.is_empty() || !exports.ending.is_empty() || exports.starting > 0
            {
                let (names, how) = match self.next_event(&exports.ending)? {
                    Event::Add { addition, answer } => {
                        exports.starting += 1;
                        self.begin(*addition, answer, &begun);
                        continue;
                    }
                    Event::Added => {
                        exports.starting -= 1;
                        for event in exports.early.drain(..) {
                            // The receiver is here.
                            let _ = self.server.events().send(event);
                        }
                        let Ok(started) = started.try_recv() else {
                            continue;
                        };
                        match exports.add(started) {
                            Some(ending) => ending,
                            None => {
                                self.tell_count(&exports);
                                continue;
                            }
                        }
                    }
                    Event::StorageChanged { export } => {
                        exports.follow_growth(scope, export);
                        continue;
                    }
                    Event::Ended { number, in_order } => {
                        exports.ending.remove(&number);
                        exports.in_order &= in_order;
                        continue;
                    }
                    Event::Signal(signal) => {
                        tracing::info!(exports = exports.serving.len(), signal, "draining");
                        let leaves = signal == signals::LEAVE;
                        self.all(
                            &mut exports,
                            if leaves { Export::leave } else { Export::stop },
                        )
                    }
                    Event::ProgramEnded => {
                        let count = exports.serving.len();
                        tracing::info!(exports = count, "the program has ended: draining");
                        self.all(&mut exports, Export::stop)
                    }
                    event => match exports.concern(event) {
                        Some((name, how)) => (vec![name], how),
                        None => continue,
                    },
                };
                for name in names {
                    self.end(scope, &mut exports, name, how);
                }
                self.tell_count(&exports);
            }
            Ok(exports.in_order)
        });
        self.server.take_exports(false);
        // Commands that wait for an export that comes too late.
        self.inbox.try_iter().for_each(drop);
        in_order
    }

    /// Tells the service manager how many exports there are.
    fn tell_count(&self, exports: &Exports) {
        let status = format!("serving {}", count(exports.serving.len(), "export"));
        self.manager.tell(&[NotifyState::Status(&status)]);
    }

    /// All exports, those that are being started too.
    fn all(&self, exports: &mut Exports, how: How) -> (Vec<String>, How) {
        self.manager.tell(&[NotifyState::Stopping]);
        self.server.take_exports(false);
        exports.how_all_end = Some(how);
        (exports.serving.keys().cloned().collect(), how)
    }

    /// Starts an export that was added.
    fn begin(&self, addition: Addition, answer: Answer, begun: &mpsc::Sender<Started>) {
        let (dir, server, begun) = (self.dir.clone(), Arc::clone(self.server), begun.clone());
        let waits = answer.clone();
        // Dropped also if the thread panics, or there is none.
        let end = Beginning(Arc::clone(self.server));
        let start = move || {
            let _end = end;
            let started = Export::add(&dir, addition, &server);
            // The receiver waits for this.
            let _ = begun.send((started, answer));
        };
        let thread = std::thread::Builder::new().name("start".into());
        if let Err(error) = thread.spawn(start) {
            let why = anyhow!(error).context("cannot start a thread");
            // A client that has gone does not wait.
            let _ = waits.send(Err(why));
        }
    }

    fn end<'scope>(
        &self,
        scope: &'scope Scope<'scope, '_>,
        exports: &mut Exports,
        name: String,
        how: How,
    ) {
        let Some(export) = exports.serving.remove(&name) else {
            return;
        };
        exports.last_end += 1;
        let number = exports.last_end;
        exports.ending.insert(number, (name, export.watch()));
        let ended = self.server.events().clone();
        end_in(scope, export, move |export| {
            let in_order = how(export);
            // The receiver waits for all of these.
            let _ = ended.send(Event::Ended { number, in_order });
        });
    }

    /// Waits for an event; while exports end, also says what they wait for.
    fn next_event(&self, ending: &BTreeMap<u64, (String, Watch)>) -> Result<Event> {
        let mut patience = PATIENCE;
        loop {
            let event = match ending.is_empty() {
                true => self.inbox.recv().map_err(RecvTimeoutError::from),
                false => self.inbox.recv_timeout(patience),
            };
            match event {
                Err(RecvTimeoutError::Timeout) => {
                    for (name, watch) in ending.values() {
                        say_what_it_waits_for(name, watch);
                    }
                    patience = REMINDER;
                }
                event => return event.context("no more events can arrive"),
            }
        }
    }
}

impl Exports {
    /// The name of an export that is served.
    fn name(&self, number: u64) -> Option<String> {
        let mut all = self.serving.iter();
        let (name, _) = all.find(|(_, export)| export.number() == number)?;
        Some(name.clone())
    }

    /// What is to end, and how, by an event that concerns one export. It is kept while exports are being started: it may
    /// concern one of those. Otherwise an export that is not there has ended.
    fn concern(&mut self, event: Event) -> Option<(String, How)> {
        let number = match &event {
            Event::Stop { export }
            | Event::Leave { export }
            | Event::Fenced { export, .. }
            | Event::Closed { export, .. } => *export,
            _ => return None,
        };
        let Some(name) = self.name(number) else {
            if self.starting > 0 {
                self.early.push(event);
            }
            return None;
        };
        match event {
            Event::Leave { .. } => Some((name, Export::leave)),
            Event::Fenced { why, .. } => {
                tracing::error!("{name}: {why}; stopping the export");
                events::tell(&name, What::Fenced { why });
                self.in_order = false;
                Some((name, Export::stop))
            }
            Event::Closed { door, why, .. } if self.close(&name, door, &why) => None,
            _ => Some((name, Export::stop)),
        }
    }

    /// Takes an export that was added, and answers. Returns what is to end, and how, if the server is ending.
    fn add(&mut self, (started, answer): Started) -> Option<(Vec<String>, How)> {
        let (ending, answered) = match started {
            Err(error) => (None, Err(error)),
            Ok(export) => {
                let status = export.status();
                let name = status.name.clone();
                self.serving.insert(name.clone(), export);
                match self.how_all_end {
                    Some(how) => (
                        Some((vec![name], how)),
                        Err(anyhow!("the server is ending")),
                    ),
                    None => (None, Ok(status)),
                }
            }
        };
        if let Err(error) = &answered {
            tracing::warn!("an export was not added: {}", explain(error));
        }
        // A client that has gone does not wait.
        let _ = answer.send(answered);
        ending
    }

    /// Makes a disk as large as its storage, in a thread of its own: the storage may have to be waited for.
    fn follow_growth<'scope>(&mut self, scope: &'scope Scope<'scope, '_>, number: u64) {
        let mut all = self.serving.iter();
        let Some((name, export)) = all.find(|(_, export)| export.number() == number) else {
            if self.starting > 0 {
                self.early.push(Event::StorageChanged { export: number });
            }
            return;
        };
        let (name, export) = (name.clone(), export.watch());
        let follow = move || {
            if let Err(error) = export.follow_growth() {
                tracing::warn!("{name}: {}", explain(&error));
            }
        };
        let thread = std::thread::Builder::new().name("resize".into());
        if let Err(error) = thread.spawn_scoped(scope, follow) {
            tracing::warn!(%error, "cannot start a thread: 'ublkup resize' has to follow the storage's size");
        }
    }

    /// Closes a door that closed by itself; whether another one stays open.
    fn close(&mut self, name: &str, door: Door, why: &str) -> bool {
        let Some(export) = self.serving.get_mut(name) else {
            return true;
        };
        tracing::error!("{name}: the {door} door closed: {why}");
        let what = What::DoorClosed {
            door: door.to_string(),
            why: why.to_owned(),
        };
        events::tell(name, what);
        self.in_order = false;
        let goes_on = export.close(door);
        if !goes_on {
            tracing::error!("{name}: the last door closed; stopping the export");
        }
        goes_on
    }
}

fn say_what_it_waits_for(name: &str, watch: &Watch) {
    let what = watch.waits_for();
    tracing::warn!(
        "{name}: still waiting for {}, which the storage has not completed; a second signal ends the server at once, \
         as a crash would",
        what.as_deref().unwrap_or("its doors")
    );
}

/// Ends all exports in parallel.
pub(super) fn end_all(exports: BTreeMap<String, Export>, end: How) {
    std::thread::scope(|scope| {
        for export in exports.into_values() {
            // Something else has failed already.
            end_in(scope, export, move |export| _ = end(export));
        }
    });
}

/// Ends an export in a thread of its own, or in this one if none can be started.
fn end_in<'scope>(
    scope: &'scope Scope<'scope, '_>,
    export: Export,
    end: impl Fn(Export) + Clone + Send + 'scope,
) {
    let (hand, given) = mpsc::channel();
    let thread = std::thread::Builder::new().name("end".into());
    let spawned = thread.spawn_scoped(scope, {
        let end = end.clone();
        move || given.into_iter().for_each(end)
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot start a thread: the other exports wait while this one drains");
    }
    // The receiver is gone if there is no thread.
    if let Err(mpsc::SendError(export)) = hand.send(export) {
        end(export);
    }
}
