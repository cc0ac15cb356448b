//! The event loop of the control side: one thread for all listening sockets and timers of a process.
//!
//! Descriptors are watched with epoll. A callback runs on the loop's thread and must not block, for
//! it holds up all others: what may block gets a thread of its own. A loop with nothing to do is not
//! scheduled: it has no timer but those that were asked for.

use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;

/// What happens to a descriptor after its callback.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// Watch it on.
    Watch,
    /// Do not watch it for so long.
    Pause(Duration),
}

/// A descriptor and what is called when it can be read.
trait Source: Send {
    fn fd(&self) -> BorrowedFd<'_>;
    fn ready(&mut self) -> Then;
}

struct Watched<S, F> {
    source: S,
    callback: F,
}

impl<S: AsFd + Send, F: FnMut(&S) -> Then + Send> Source for Watched<S, F> {
    fn fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }

    fn ready(&mut self) -> Then {
        (self.callback)(&self.source)
    }
}

/// The loop. There is one per process, [`EventLoop::get`], and its thread stays to the end.
pub struct EventLoop {
    epoll: OwnedFd,
    /// Wakes the thread for an earlier timer.
    bell: OwnedFd,
    state: Mutex<State>,
    /// A callback has returned.
    returned: Condvar,
}

#[derive(Default)]
struct State {
    /// By number; `None` while the callback runs.
    sources: HashMap<u64, Option<Box<dyn Source>>>,
    timers: BTreeMap<(Instant, u64), Timer>,
    last_number: u64,
    thread: Option<ThreadId>,
}

enum Timer {
    Call(Box<dyn FnOnce() + Send>),
    /// Watch a source again.
    Resume(u64),
}

/// The number of the bell; those of sources begin behind it.
const BELL: u64 = 0;

/// A descriptor that is being watched. Dropping it ends that: when the drop returns, the callback is
/// not running and will not run, and both callback and descriptor are dropped.
#[derive(Debug)]
pub struct Registration {
    number: u64,
}

/// A call that is to come. Dropping it ends that, unless it has begun.
#[derive(Debug)]
#[must_use = "nothing is called when it is dropped"]
pub struct Alarm(Option<(Instant, u64)>);

static LOOP: Mutex<Option<&'static EventLoop>> = Mutex::new(None);

impl EventLoop {
    /// The loop of this process; the first call starts it.
    ///
    /// # Errors
    ///
    /// When the descriptors or the thread cannot be had.
    pub fn get() -> io::Result<&'static Self> {
        let mut current = LOOP.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(event_loop) = *current {
            return Ok(event_loop);
        }
        let event_loop = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            state: Mutex::default(),
            returned: Condvar::new(),
        };
        let data = EventData::new_u64(BELL);
        epoll::add(&event_loop.epoll, &event_loop.bell, data, EventFlags::IN)?;
        // One per process, for as long as that lives.
        let event_loop: &'static Self = Box::leak(Box::new(event_loop));
        let thread = thread::Builder::new().name("events".into());
        let thread = thread.spawn(|| event_loop.run())?;
        event_loop.state().thread = Some(thread.thread().id());
        *current = Some(event_loop);
        Ok(event_loop)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No callback runs under the lock, and everything else leaves the tables whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `callback` on the loop's thread whenever `source` can be read. It is called again while
    /// that is so; reading a part, one connection say, gives the others their turn.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be watched.
    pub fn watch<S: AsFd + Send + 'static>(
        &self,
        source: S,
        callback: impl FnMut(&S) -> Then + Send + 'static,
    ) -> io::Result<Registration> {
        let mut state = self.state();
        state.last_number += 1;
        let number = state.last_number;
        let watched = Watched { source, callback };
        let data = EventData::new_u64(number);
        epoll::add(&self.epoll, watched.fd(), data, EventFlags::IN)?;
        state.sources.insert(number, Some(Box::new(watched)));
        Ok(Registration { number })
    }

    /// Calls `callback` on the loop's thread after `delay`.
    pub fn call_after(&self, delay: Duration, callback: impl FnOnce() + Send + 'static) -> Alarm {
        Alarm(self.set_timer(delay, Timer::Call(Box::new(callback))))
    }

    /// `None` for a time beyond the clock's range, which never comes.
    fn set_timer(&self, delay: Duration, timer: Timer) -> Option<(Instant, u64)> {
        let at = Instant::now().checked_add(delay)?;
        let mut state = self.state();
        state.last_number += 1;
        let key = (at, state.last_number);
        state.timers.insert(key, timer);
        let is_next = state.timers.keys().next() == Some(&key);
        drop(state);
        if is_next {
            // It fails only if the counter is at its end, and then the eventfd is readable already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
        Some(key)
    }

    fn unwatch(&self, number: u64) {
        let mut state = self.state();
        // A callback that ends its own registration cannot wait for itself.
        let waits = state.thread != Some(thread::current().id());
        while waits && matches!(state.sources.get(&number), Some(None)) {
            state = (self.returned.wait(state)).unwrap_or_else(PoisonError::into_inner);
        }
        let Some(source) = state.sources.remove(&number) else {
            return;
        };
        if let Some(source) = &source {
            // It fails only if the kernel has forgotten the descriptor.
            let _ = epoll::delete(&self.epoll, source.fd());
        }
        drop(state);
        drop(source);
    }

    fn run(&self) -> ! {
        let mut events = [MaybeUninit::uninit(); 64];
        loop {
            let limit = self.next_timer();
            let ready = match epoll::wait(&self.epoll, &mut events, limit.as_ref()) {
                Ok((ready, _)) => &*ready,
                Err(Errno::INTR) => continue,
                Err(error) => {
                    // No known cause; without a pause it would fill the log.
                    tracing::error!(%error, "cannot wait for events");
                    thread::sleep(Duration::from_secs(1));
                    continue;
                }
            };
            for event in ready {
                match event.data.u64() {
                    BELL => {
                        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
                    }
                    number => self.call(number),
                }
            }
            self.call_timers();
        }
    }

    /// How long to sleep; `None` without a timer.
    fn next_timer(&self) -> Option<Timespec> {
        let state = self.state();
        let (at, _) = state.timers.keys().next()?;
        let left = at.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn call(&self, number: u64) {
        // One that has been removed since the event arrived is not called.
        let Some(mut source) = (self.state().sources.get_mut(&number)).and_then(Option::take)
        else {
            return;
        };
        let then = catch_unwind(AssertUnwindSafe(|| source.ready())).unwrap_or_else(|panic| {
            report(&*panic);
            Then::Pause(Duration::from_secs(1))
        });
        let mut state = self.state();
        let Some(place) = state.sources.get_mut(&number) else {
            // It has removed itself.
            let _ = epoll::delete(&self.epoll, source.fd());
            drop(state);
            drop(source);
            self.returned.notify_all();
            return;
        };
        if let Then::Pause(_) = then {
            self.set_interest(number, source.fd(), EventFlags::empty());
        }
        *place = Some(source);
        drop(state);
        self.returned.notify_all();
        if let Then::Pause(delay) = then {
            self.set_timer(delay, Timer::Resume(number));
        }
    }

    fn call_timers(&self) {
        loop {
            let mut state = self.state();
            let Some(entry) = state.timers.first_entry() else {
                return;
            };
            if entry.key().0 > Instant::now() {
                return;
            }
            match entry.remove() {
                Timer::Call(callback) => {
                    drop(state);
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(callback)) {
                        report(&*panic);
                    }
                }
                Timer::Resume(number) => {
                    if let Some(Some(source)) = state.sources.get(&number) {
                        self.set_interest(number, source.fd(), EventFlags::IN);
                    }
                }
            }
        }
    }

    fn set_interest(&self, number: u64, fd: BorrowedFd<'_>, flags: EventFlags) {
        let data = EventData::new_u64(number);
        if let Err(error) = epoll::modify(&self.epoll, fd, data, flags) {
            tracing::error!(%error, "cannot change the events of a descriptor");
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // There is a loop, or there would be no registration.
        if let Ok(event_loop) = EventLoop::get() {
            event_loop.unwatch(self.number);
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        if let (Some(key), Ok(event_loop)) = (self.0, EventLoop::get()) {
            let timer = event_loop.state().timers.remove(&key);
            // Not under the lock: it drops what the callback has.
            drop(timer);
        }
    }
}

fn report(panic: &(dyn Any + Send)) {
    tracing::error!("a callback panicked: {}", super::end::panic_message(panic));
}

#[cfg(test)]
#[path = "event_loop_tests.rs"]
mod tests;
