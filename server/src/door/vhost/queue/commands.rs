//! What a queue thread does for the session's protocol thread.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::VhostQueues;
use super::command::Command;
use crate::door::vhost::config_space::mask;
use crate::door::vhost::dirty::Logging;
use crate::door::vhost::memory::{HeldMap, MemoryMap};
use crate::door::vhost::ring_layout::{RingError, RingOptions};
use crate::door::vhost::virtqueue::Virtqueue;
use crate::door::vhost::vring::{Start, Vring};
use crate::io::Ring;

impl VhostQueues {
    /// Does what is asked, and replies.
    pub(super) fn obey(&mut self, ring: &mut Ring, command: Command) {
        // A reply that is no longer waited for may be lost.
        match command {
            Command::Start(start, reply) => {
                let _ = reply.send(self.begin(ring, *start));
            }
            Command::Stop(index, reply) => {
                if let Some(vring) = self.vring(index) {
                    vring.stop(Some(reply));
                }
            }
            Command::Enable(index, on, reply) => {
                if let Some(vring) = self.vring(index) {
                    vring.enable(on);
                    vring.listening = false;
                }
                let _ = reply.send(());
            }
            Command::Call(index, call, reply) => {
                if let Some(vring) = self.vring(index) {
                    let pushed = vring.replace_call(ring, call);
                    self.expect_room(pushed);
                }
                let _ = reply.send(());
            }
            Command::Error(index, error, reply) => {
                if let Some(vring) = self.vring(index)
                    && !vring.error_armed
                {
                    vring.error = error;
                }
                let _ = reply.send(());
            }
            Command::Memory(map, logging, reply) => {
                self.set_memory(ring, map, logging);
                let _ = reply.send(());
            }
            Command::LogUsed(index, used_guest, reply) => {
                if let Some(vring) = self.vring(index) {
                    vring.set_used_guest(used_guest);
                }
                let _ = reply.send(());
            }
            Command::Exit => {
                self.exiting = true;
                let mut unanswered = 0;
                for vring in self.vrings.iter_mut().flatten() {
                    unanswered += vring.unanswered();
                    vring.stop(None);
                }
                (self.connection.unanswered).fetch_add(unanswered, Ordering::Relaxed);
            }
        }
    }

    fn begin(&mut self, ring: &mut Ring, mut start: Start) -> Result<(), RingError> {
        let local = usize::from(start.index / self.threads);
        let options = RingOptions {
            size: start.size,
            event_index: start.features & mask(VIRTIO_RING_F_EVENT_IDX) != 0,
            indirect: start.features & mask(VIRTIO_RING_F_INDIRECT_DESC) != 0,
        };
        let inflight = start.inflight.take();
        let queue = Virtqueue::new(options, start.addresses, start.base, &start.map, inflight)?;
        self.map = Rc::new(HeldMap::new(Arc::clone(&start.map)));
        self.logging = start.logging.take();
        let mut vring = Box::new(Vring::new(start, queue));
        vring.set_logged(self.logs_requests());
        self.expect_room(vring.arm_kick(ring));
        if self.vrings.len() <= local {
            self.vrings.resize_with(local + 1, || None);
        }
        self.vrings[local] = Some(vring);
        Ok(())
    }

    fn set_memory(&mut self, ring: &mut Ring, map: Arc<MemoryMap>, logging: Option<Logging>) {
        // Requests in flight keep the old map; rings must be in the new one.
        if !std::ptr::eq(self.map.map(), &raw const *map) {
            self.map = Rc::new(HeldMap::new(map));
        }
        self.logging = logging;
        let logged = self.logs_requests();
        for local in 0..self.vrings.len() {
            let Some(vring) = &mut self.vrings[local] else {
                continue;
            };
            vring.set_logged(logged);
            if let Err(error) = vring.queue.remap(self.map.map()) {
                self.break_vring(ring, local, error);
            }
        }
    }

    fn logs_requests(&self) -> bool {
        (self.logging.as_ref()).is_some_and(|logging| logging.requests)
    }
}
