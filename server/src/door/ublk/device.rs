//! The life of a ublk device: added, served by its queue threads, taken down.
//!
//! Whoever makes a [`Device`] gets it removed again, also when its start fails half way. The order
//! matters: the driver ends `STOP_DEV` only when the requests under way were answered, which takes
//! living queue threads; `DEL_DEV` ends only when the character device was closed, which takes dead
//! ones. When a queue thread fell over, its requests are answered by nobody, and only closing the
//! character device makes the driver give them up: then the stop is left out.

use std::fs::{File, OpenOptions};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libublk::sys;

use super::choice;
use super::control::{Control, NewDevice};
use super::error::UblkError;
use super::features::{Features, features_of};
use super::fence::WriteGate;
use super::memory::page_bytes;
use super::owner;
use super::params::{Params, buffer_bytes, check_queues, params};
use super::queue::{Command, QueueConfig, UblkQueue};
use super::stale_device;
use super::{DataPath, Facts, UblkConfig};
use crate::engine::counters::Counters;
use crate::engine::cpus::{Cpus, is_unbound, settle_on};
use crate::engine::crash;
use crate::engine::mailbox::{self, Mailbox};
use crate::engine::queue_thread::QueueThread;
use crate::engine::{RingBuffers, Storage};

/// How long queue threads may take to come up, and to end when they were told to.
const THREAD_LIMIT: Duration = Duration::from_secs(30);

/// How long the driver may wait for an idle request before a device is left.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// How long the character device may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(5);

/// What happens to a device.
pub(super) enum Event {
    /// A queue thread is about to serve.
    Ready,
    /// A queue thread ended.
    Ended {
        queue: u16,
        result: Result<(), String>,
    },
    /// Somebody wants the device to end.
    Stop,
    /// Somebody wants the device to end if nobody has the disk open, and to hear whether it does.
    StopUnlessOpen(Sender<Result<(), UblkError>>),
    /// Somebody wants the device to go on with another server.
    Leave,
}

/// How the time of a device with its queue threads ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Nobody wanted it.
    Nothing,
    /// The device is to go.
    Stop,
    /// The device is to stay for another server.
    Leave,
}

/// One queue thread, seen from outside.
struct Queue {
    commands: mailbox::Sender<Command>,
    thread: JoinHandle<()>,
}

/// A device that exists in the driver, and its queue threads.
pub(super) struct Device {
    id: u32,
    control: Control,
    char_device: Option<Arc<File>>,
    queues: Vec<Queue>,
    events: Receiver<Event>,
    /// Queue threads that have not ended.
    running: usize,
    /// The first queue that failed, and why.
    failure: Option<(u16, String)>,
    removed: bool,
    /// It was made by a server that died, and is not ours yet: if it cannot be taken over, it stays
    /// for the next who tries.
    others: bool,
    facts: Facts,
}

impl Device {
    /// Adds a device, starts its queue threads and makes the disk appear.
    pub(super) fn start<B: Storage>(
        config: &UblkConfig,
        backend: &Arc<B>,
        counters: impl FnMut() -> Arc<Counters>,
    ) -> Result<(Self, Sender<Event>), UblkError> {
        check_queues(config.queues, config.depth)?;
        let limits = backend.limits();
        let page = page_bytes();
        let params = params(limits, buffer_bytes(limits, page), page)?;
        let control = Control::open()?;
        let features = features_of(&control)?;
        let ring_buffers = backend.ring_buffers();
        let chosen = choice::of(config, ring_buffers, features, owner::is_administrator()?)?;
        let alignment_bytes = match ring_buffers {
            RingBuffers::Better { alignment_bytes } if chosen.data == DataPath::ZeroCopy => {
                Some(alignment_bytes)
            }
            _ => None,
        };
        let info = match config.take_over {
            Some(id) => stale_device::take_over(&control, id)?,
            None => control.add(NewDevice {
                id: config.id,
                queues: config.queues,
                depth: config.depth,
                buffer_bytes: buffer_bytes(limits, page),
                mark: config.mark,
                flags: chosen.flags,
            })?,
        };
        let (sender, events) = channel();
        // From here on the device goes away with this value.
        let mut device = Self {
            id: info.dev_id,
            control,
            char_device: None,
            queues: Vec::with_capacity(info.nr_hw_queues.into()),
            events,
            running: 0,
            failure: None,
            removed: false,
            others: config.take_over.is_some(),
            facts: Facts {
                queues: info.nr_hw_queues,
                depth: info.queue_depth,
                data: choice::data_path_of(&info),
                features: Features(info.flags),
                affinity: None,
            },
        };
        if device.others && device.facts.data == DataPath::ZeroCopy {
            device.check_ring_buffers(ring_buffers)?;
        }
        crash::point("device-added");
        // First of all: the device of an ordinary user belongs to root until udev has seen it, and
        // takes no commands from us.
        device.char_device = Some(Arc::new(open_char_device(device.id)?));
        if !device.others {
            let params = Params::new(params, alignment_bytes);
            device.control.set_params(device.id, params)?;
        }
        device.facts.affinity = match config.affinity {
            Some(true) => Some(device.affinity()?),
            None if device.facts.queues > 1 && config.threads.cpus.is_none() && is_unbound() => {
                // They run well enough elsewhere.
                let refused = |error| tracing::debug!(%error, "queue threads run anywhere");
                device.affinity().map_err(refused).ok()
            }
            _ => None,
        };
        device.spawn(&info, config, backend, counters, &sender)?;
        device.await_ready()?;
        crash::point("before-start");
        device.start_disk()?;
        crash::point("disk-started");
        let sectors = params.basic.dev_sectors;
        if device.others && device.control.params(device.id)?.basic.dev_sectors != sectors {
            // Its server died between two sizes.
            device.control.update_size(device.id, sectors)?;
        }
        device.others = false;
        Ok((device, sender))
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Whether a disk can do with the data as the device, which another server made, hands it over.
    fn check_ring_buffers(&self, disk: RingBuffers) -> Result<(), UblkError> {
        let why = match disk {
            RingBuffers::Possible => return Ok(()),
            RingBuffers::No => "which this disk cannot do".to_owned(),
            RingBuffers::Better { alignment_bytes } => {
                let has = self.control.data_alignment(self.id)?;
                if has >= alignment_bytes {
                    return Ok(());
                }
                format!(
                    "at multiples of {has} bytes, and this disk wants multiples of {alignment_bytes}, \
                     as it does not with cache=buffered"
                )
            }
        };
        Err(UblkError::Config(format!(
            "ublk{} was made for data without a copy, {why}; ublkup doctor --clean removes it",
            self.id
        )))
    }

    /// The processors whose requests go to each queue.
    fn affinity(&self) -> Result<Vec<Cpus>, UblkError> {
        let of = |queue| {
            let mask = self.control.queue_affinity(self.id, queue)?;
            Cpus::from_mask(&mask).ok_or_else(|| UblkError::Queue {
                id: self.id,
                queue,
                reason: "no processor sends it requests; try --ublk-affinity=no".into(),
            })
        };
        (0..self.facts.queues).map(of).collect()
    }

    /// The switch for the writes of all queues.
    pub(super) fn fence(&self) -> WriteGate {
        let queues = self.queues.iter().map(|queue| queue.commands.clone());
        WriteGate::new(self.id, queues.collect())
    }

    /// The open character device, while there is one.
    pub(super) fn char_device(&self) -> Weak<File> {
        self.char_device
            .as_ref()
            .map_or_else(Weak::new, Arc::downgrade)
    }

    /// Sleeps until somebody wants the device to end, or a queue thread ended.
    pub(super) fn await_end(&mut self) -> Wanted {
        loop {
            match self.events.recv() {
                Ok(Event::Ended { queue, result }) => {
                    self.note_end(queue, result);
                    return Wanted::Nothing;
                }
                Ok(Event::Ready) => unreachable!("all queue threads were ready"),
                Ok(Event::StopUnlessOpen(reply)) => {
                    let stopped = self.control.stop_unless_open(self.id);
                    let done = stopped.is_ok();
                    // Who no longer waits wanted it all the same.
                    let _ = reply.send(stopped);
                    if done {
                        return Wanted::Stop;
                    }
                }
                Ok(Event::Leave) => return Wanted::Leave,
                // Without a sender there is nobody left to serve for.
                Ok(Event::Stop) | Err(_) => return Wanted::Stop,
            }
        }
    }

    /// Ends the queue threads and leaves the device to another server. What the driver has handed out
    /// is answered first, as far as it lets us know that there is no more.
    ///
    /// # Errors
    ///
    /// What went wrong. The device stays in any case, and the driver does for the requests that were
    /// not answered what it does when a server dies.
    pub(super) fn leave(&mut self) -> Result<(), UblkError> {
        self.removed = true;
        let quiesces = self.facts.features.has(sys::UBLK_F_QUIESCE);
        match quiesces.then(|| self.control.quiesce(self.id, QUIESCE_LIMIT)) {
            Some(Ok(())) => {
                for queue in &self.queues {
                    queue.commands.send(Command::Leave);
                }
            }
            // All tags are in use: those that are begun are answered, the driver keeps the others.
            Some(Err(error)) => {
                tracing::warn!("{error}");
                self.tell_to_quit();
            }
            None => self.tell_to_quit(),
        }
        crash::point("quiesced");
        let ended = self.await_threads();
        self.char_device = None;
        self.take_failure().and(ended)
    }

    /// Takes the device down: no disk, no threads, no device.
    ///
    /// # Errors
    ///
    /// The first thing that went wrong, now or before; what could be done was done all the same.
    pub(super) fn take_down(&mut self) -> Result<(), UblkError> {
        if std::mem::replace(&mut self.removed, true) {
            return Ok(());
        }
        if self.others {
            self.tell_to_quit();
            let ended = self.await_threads();
            self.char_device = None;
            return self.take_failure().and(ended);
        }
        let stopped = if self.failure.is_none() && self.char_device.is_some() {
            gone_is_fine(self.control.stop(self.id))
        } else {
            Ok(())
        };
        if stopped.is_err() || self.failure.is_some() {
            self.tell_to_quit();
        }
        let ended = self.await_threads();
        self.char_device = None;
        // Also when a thread is stuck: its end, or that of the process, then removes the device.
        let deleted = self.control.delete(self.id);
        let deleted = gone_is_fine(deleted.map(|deleted| deleted.tell(self.id)));
        self.take_failure().and(stopped).and(ended).and(deleted)
    }

    fn take_failure(&mut self) -> Result<(), UblkError> {
        match self.failure.take() {
            Some((queue, reason)) => Err(UblkError::Queue {
                id: self.id,
                queue,
                reason,
            }),
            None => Ok(()),
        }
    }

    fn spawn<B: Storage>(
        &mut self,
        info: &sys::ublksrv_ctrl_dev_info,
        config: &UblkConfig,
        backend: &Arc<B>,
        mut counters: impl FnMut() -> Arc<Counters>,
        events: &Sender<Event>,
    ) -> Result<(), UblkError> {
        for queue in 0..info.nr_hw_queues {
            let failed = |error: io::Error| UblkError::Queue {
                id: info.dev_id,
                queue,
                reason: error.to_string(),
            };
            let (commands, mailbox) = Mailbox::new().map_err(failed)?;
            let char_device = self.char_device.as_ref().expect("it was opened before");
            let queue_config = QueueConfig {
                char_device: Arc::clone(char_device),
                queue,
                depth: info.queue_depth,
                buffer_bytes: info.max_io_buf_bytes,
                limits: backend.limits().clone(),
                counters: counters(),
                fault: Arc::new(AtomicI32::new(0)),
                refuse_writes: config.refuse_writes,
                data: self.facts.data,
                may_copy: self.facts.features.has(sys::UBLK_F_USER_COPY),
                threads: config.threads.clone(),
                cpus: (self.facts.affinity.as_ref()).map(|cpus| cpus[usize::from(queue)].clone()),
                insists: config.affinity == Some(true),
            };
            let ring_places = config.ring_places.unwrap_or(info.queue_depth);
            let backend = Arc::clone(backend);
            let events = events.clone();
            let thread = thread::Builder::new()
                .name(format!("ublk{}-q{queue}", info.dev_id))
                .spawn(move || {
                    // What is unwound is gone afterwards: nobody sees it broken.
                    let serve = AssertUnwindSafe(|| {
                        serve_queue(queue_config, ring_places, &*backend, mailbox, &events)
                    });
                    let result = catch_unwind(serve)
                        .unwrap_or_else(|_| Err("its thread panicked".to_owned()));
                    // Without a receiver nobody waits.
                    let _ = events.send(Event::Ended { queue, result });
                })
                .map_err(failed)?;
            self.queues.push(Queue { commands, thread });
            self.running += 1;
        }
        Ok(())
    }

    fn await_ready(&mut self) -> Result<(), UblkError> {
        let deadline = Instant::now() + THREAD_LIMIT;
        for _ in 0..self.queues.len() {
            match self.next_event(deadline) {
                Ok(Event::Ready | Event::Stop | Event::StopUnlessOpen(_) | Event::Leave) => {}
                Ok(Event::Ended { queue, result }) => {
                    self.note_end(queue, result);
                    return Err(self.failed_start());
                }
                Err(_) => {
                    let reason = format!("not ready within {} s", THREAD_LIMIT.as_secs());
                    self.failure = Some((0, reason));
                    return Err(self.failed_start());
                }
            }
        }
        Ok(())
    }

    fn start_disk(&mut self) -> Result<(), UblkError> {
        let threads: Vec<_> = self.queues.iter().map(|q| &q.thread).collect();
        let some_ended = || threads.iter().any(|thread| thread.is_finished());
        let started = match self.others {
            true => self.control.end_recovery(self.id, &some_ended),
            false => self.control.start(self.id, &some_ended),
        };
        if started.is_err() {
            // A queue that failed is the better explanation.
            while let Ok(Event::Ended { queue, result }) = self.events.try_recv() {
                self.note_end(queue, result);
            }
            if self.failure.is_some() {
                return Err(self.failed_start());
            }
        }
        started
    }

    /// Takes the device down because a queue ended too early, and says why it did.
    fn failed_start(&mut self) -> UblkError {
        match self.take_down() {
            Err(error) => error,
            Ok(()) => UblkError::Queue {
                id: self.id,
                queue: 0,
                reason: "somebody stopped the device before its disk was there".to_owned(),
            },
        }
    }

    fn next_event(&self, deadline: Instant) -> Result<Event, RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.events.recv_timeout(left)
    }

    fn note_end(&mut self, queue: u16, result: Result<(), String>) {
        self.running -= 1;
        if let Err(reason) = result {
            self.failure.get_or_insert((queue, reason));
        }
    }

    fn tell_to_quit(&self) {
        for queue in &self.queues {
            queue.commands.send(Command::Quit);
        }
    }

    /// Waits until all queue threads ended. One that failed makes the others quit.
    fn await_threads(&mut self) -> Result<(), UblkError> {
        let deadline = Instant::now() + THREAD_LIMIT;
        while self.running > 0 {
            match self.next_event(deadline) {
                Ok(Event::Ended { queue, result }) => {
                    let failed = result.is_err();
                    self.note_end(queue, result);
                    if failed {
                        self.tell_to_quit();
                    }
                }
                Ok(Event::Ready | Event::Stop | Event::StopUnlessOpen(_) | Event::Leave) => {}
                Err(_) => {
                    return Err(UblkError::Stuck {
                        id: self.id,
                        threads: self.running,
                        limit: THREAD_LIMIT,
                    });
                }
            }
        }
        for queue in self.queues.drain(..) {
            // It said that it ended, and caught its panics.
            let _ = queue.thread.join();
        }
        Ok(())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::error!("{error}");
        }
    }
}

/// What a queue thread does, from its first to its last instruction.
fn serve_queue<B: Storage>(
    config: QueueConfig,
    ring_places: u16,
    backend: &B,
    mailbox: Mailbox<Command>,
    events: &Sender<Event>,
) -> Result<(), String> {
    let counters = Arc::clone(&config.counters);
    let fault = Arc::clone(&config.fault);
    let text = |error: io::Error| error.to_string();
    let threads = config.threads.clone();
    match &config.cpus {
        Some(cpus) if config.insists => settle_on(cpus).map_err(text)?,
        // Perhaps none of them is there now.
        Some(cpus) => settle_on(cpus).unwrap_or_else(
            |error| tracing::debug!(%error, queue = config.queue, "it runs anywhere"),
        ),
        None => threads.settle(config.queue).map_err(text)?,
    }
    let data = config.data;
    let queue = UblkQueue::new(config).map_err(text)?;
    let thread = QueueThread::new(queue, backend, mailbox, &counters, &threads).map_err(text)?;
    if data == DataPath::ZeroCopy {
        thread.reserve_buffers(ring_places.into()).map_err(text)?;
    }
    let _ = events.send(Event::Ready);
    thread.run().map_err(text)?;
    match fault.load(Ordering::Relaxed) {
        0 => Ok(()),
        errno => {
            let error = io::Error::from_raw_os_error(errno);
            Err(format!("the driver refused a command: {error}"))
        }
    }
}

/// Opens the character device, which appears a moment after the device was added.
fn open_char_device(id: u32) -> Result<File, UblkError> {
    let deadline = Instant::now() + NODE_LIMIT;
    loop {
        let path = super::char_path(id);
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => return Ok(file),
            // udev may not have made the node, or may be changing its mode.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EACCES))
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) if error.raw_os_error() == Some(libc::EACCES) => {
                return Err(UblkError::NotOurs { id });
            }
            Err(source) => return Err(UblkError::CharDevice { id, source }),
        }
    }
}

/// Whoever stopped or deleted the device before us did what we wanted.
fn gone_is_fine(result: Result<(), UblkError>) -> Result<(), UblkError> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}
