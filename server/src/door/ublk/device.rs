//! The life of a ublk device: added, served by its queue threads, taken down.
//!
//! Dropping a [`Device`] removes it, also when its start fails half way. The order matters:
//! `STOP_DEV` completes only after all in-flight requests were answered, so the queue threads must
//! still run; `DEL_DEV` only after the character device was closed, so they must have ended. After a
//! queue thread failed its requests have no answer, and only closing the character device makes the
//! driver fail them: then `STOP_DEV` is left out. So it is while the storage does not answer: a process that waits for
//! `STOP_DEV` cannot be killed, not by SIGKILL either, for its end waits for the command, the command for the requests, and
//! only the end of the process would close the character device.

use std::fs::{File, OpenOptions};
use std::sync::{Arc, Weak};
use std::time::Duration;

use libublk::sys;

use super::choice;
use super::config::{DataPath, Facts, NodeElsewhere, UblkConfig};
use super::control::{Control, NewDevice};
use super::error::UblkError;
use super::features::Features;
use super::memory::page_bytes;
use super::params::{Params, buffer_bytes, check_queues, params};
use super::paths::char_path;
use super::privileges::is_administrator;
use super::queue_threads::QueueThreads;
use super::stale_device;
use crate::engine::counters::Counters;
use crate::engine::cpus::{Cpus, is_unbound};
use crate::engine::crash;
use crate::engine::wait::repeat_while;
use crate::engine::{RingBuffers, Storage};

/// How long the driver may wait for an idle request before a device is left.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

/// How long requests may take to end before a device is stopped.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How long the character device may take to appear.
const NODE_LIMIT: Duration = Duration::from_secs(5);

/// How often it is looked for.
const NODE_INTERVAL: Duration = Duration::from_millis(5);

/// A device that exists in the driver, and its queue threads.
pub(super) struct Device {
    id: u32,
    control: Control,
    char_device: Option<Arc<File>>,
    queues: QueueThreads,
    removed: bool,
    /// It was made by a server that died, and is not ours yet: if it cannot be taken over, it stays
    /// for the next server.
    others: bool,
    facts: Facts,
}

impl Device {
    /// Adds a device, starts its queue threads and makes the disk appear.
    pub(super) fn start<B: Storage>(
        config: &UblkConfig,
        storage: &Arc<B>,
        counters: impl FnMut() -> Arc<Counters>,
    ) -> Result<Self, UblkError> {
        check_queues(config.queues, config.depth)?;
        let limits = storage.limits();
        let page = page_bytes();
        let params = params(limits, buffer_bytes(limits, page), page)?;
        let control = Control::open()?;
        let features = control.features()?;
        let ring_buffers = storage.ring_buffers();
        let chosen = choice::of(config, ring_buffers, features, is_administrator()?)?;
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
        // From here on the device goes away with this value.
        let mut device = Self {
            id: info.dev_id,
            control,
            char_device: None,
            queues: QueueThreads::new(info.dev_id),
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
        let elsewhere = config.elsewhere.as_ref();
        let char_device = Arc::new(open_char_device(device.id, elsewhere)?);
        device.char_device = Some(Arc::clone(&char_device));
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
        let (queues, facts) = (&mut device.queues, &device.facts);
        let started = queues.start(&info, config, facts, &char_device, storage, counters);
        drop(char_device);
        started.map_err(|error| device.failed_start(error))?;
        crash::point("before-start");
        device.start_disk()?;
        crash::point("disk-started");
        let sectors = params.basic.dev_sectors;
        if device.others && device.control.params(device.id)?.basic.dev_sectors != sectors {
            // Its server died between two sizes.
            device.control.update_size(device.id, sectors)?;
        }
        device.others = false;
        Ok(device)
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

    /// The queue threads.
    pub(super) fn queues(&self) -> &QueueThreads {
        &self.queues
    }

    /// The open character device, while there is one.
    pub(super) fn char_device(&self) -> Weak<File> {
        self.char_device
            .as_ref()
            .map_or_else(Weak::new, Arc::downgrade)
    }

    /// Stops the device unless its disk is open. Returns what the driver answered.
    pub(super) fn stop_unless_open(&self) -> Result<(), UblkError> {
        self.control.stop_unless_open(self.id)
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
        let _ = self.queues.unwatch();
        let quiesces = self.facts.features.has(sys::UBLK_F_QUIESCE);
        match quiesces.then(|| self.control.quiesce(self.id, QUIESCE_LIMIT)) {
            Some(Ok(())) => self.queues.leave(),
            // All tags are in use: those that are begun are answered, the driver keeps the others.
            Some(Err(error)) => {
                tracing::warn!("{error}");
                self.queues.quit();
            }
            None => self.queues.quit(),
        }
        crash::point("quiesced");
        let ended = self.queues.wait_ended();
        self.char_device = None;
        self.queues.take_failure().and(ended)
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
        let _ = self.queues.unwatch();
        if self.others {
            self.queues.quit();
            let ended = self.queues.wait_ended();
            self.char_device = None;
            return self.queues.take_failure().and(ended);
        }
        // A queue that has failed answers nothing.
        if !self.queues.any_failed()
            && let Err(stuck) = self.queues.await_answers(ANSWER_LIMIT)
            && !self.queues.any_failed()
        {
            self.queues.quit();
            self.char_device = None;
            return Err(stuck);
        }
        let stopped = if !self.queues.any_failed() && self.char_device.is_some() {
            gone_is_fine(self.control.stop(self.id))
        } else {
            Ok(())
        };
        if stopped.is_err() || self.queues.any_failed() {
            self.queues.quit();
        }
        let ended = self.queues.wait_ended();
        self.char_device = None;
        // Also when a thread is stuck: its end, or that of the process, then removes the device.
        let deleted = self.control.delete(self.id);
        let deleted = gone_is_fine(deleted.map(|deleted| deleted.tell(self.id)));
        self.queues
            .take_failure()
            .and(stopped)
            .and(ended)
            .and(deleted)
    }

    fn start_disk(&mut self) -> Result<(), UblkError> {
        let some_ended = || self.queues.any_ended();
        let started = match self.others {
            true => self.control.end_recovery(self.id, &some_ended),
            false => self.control.start(self.id, &some_ended),
        };
        // A queue that failed is the better explanation.
        started.map_err(|error| match self.queues.any_failed() {
            true => self.failed_start(error),
            false => error,
        })
    }

    /// Takes the device down because a queue ended too early, and says why it did.
    fn failed_start(&mut self, error: UblkError) -> UblkError {
        self.take_down().err().unwrap_or(error)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::error!("{error}");
        }
    }
}

/// Opens the character device, which appears a moment after the device was added.
fn open_char_device(id: u32, elsewhere: Option<&NodeElsewhere>) -> Result<File, UblkError> {
    let mut path = char_path(id);
    if let Some(NodeElsewhere { folder, link }) = elsewhere {
        link(id).map_err(|source| UblkError::CharDevice { id, source })?;
        path = folder.join(path.file_name().unwrap_or_default());
    }
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    let errno = |opened: &std::io::Result<File>| opened.as_ref().err()?.raw_os_error();
    // udev may not have made the node, or may be changing its mode.
    let comes = |opened: &_| matches!(errno(opened), Some(libc::ENOENT | libc::EACCES));
    let opened = repeat_while(NODE_LIMIT, NODE_INTERVAL, open, comes);
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::EACCES) => UblkError::NotOurs { id },
        _ => UblkError::CharDevice { id, source },
    })
}

/// Makes "there is no such device" a success: another process stopped or deleted it first.
fn gone_is_fine(result: Result<(), UblkError>) -> Result<(), UblkError> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}
