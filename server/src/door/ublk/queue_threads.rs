//! The queue threads of a device: how they start, what they are told, and how they end.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use libublk::sys;

use super::config::{DataPath, Facts, UblkConfig};
use super::error::UblkError;
use super::gate::{WriteGate, await_all};
use super::queue::{Command, QueueConfig, UblkQueue};
use super::refusals::Refusals;
use crate::engine::counters::Counters;
use crate::engine::cpus::settle_on;
use crate::engine::mailbox::{self, Mailbox};
use crate::engine::queue_thread::QueueThread;
use crate::engine::{End, Spawned, Storage, spawn_queue};

/// For how long limits hold back requests of an ordinary user's device: the driver kills its server when one is older than
/// 30 s (`ublk_timeout` in `drivers/block/ublk_drv.c`, the block layer's default).
const LONGEST_HOLD: Duration = Duration::from_secs(15);

/// How long queue threads may take to come up, and to end when they were told to.
const THREAD_LIMIT: Duration = Duration::from_secs(30);

/// What is called when a queue thread ends that was not told to.
pub(super) type OnEnd = Box<dyn FnOnce() + Send>;

/// The queue threads of a device.
pub(super) struct QueueThreads {
    id: u32,
    commands: Vec<mailbox::Sender<Command>>,
    ends: Arc<Ends>,
}

/// Where queue threads report their ends.
#[derive(Default)]
struct Ends {
    state: Mutex<State>,
    /// A thread has ended.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Threads that have not ended.
    running: usize,
    /// Whether one has ended.
    any_ended: bool,
    /// The first queue that failed, and why.
    failure: Option<(u16, String)>,
    on_end: Option<OnEnd>,
}

impl Ends {
    fn state(&self) -> MutexGuard<'_, State> {
        // Each change leaves a state that is one, whatever its author panics about afterwards.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that runs. Dropping it is its end.
struct Running {
    queue: u16,
    ends: Arc<Ends>,
}

impl Running {
    fn new(ends: &Arc<Ends>, queue: u16) -> Self {
        ends.state().running += 1;
        Self {
            queue,
            ends: Arc::clone(ends),
        }
    }

    /// The thread ended like this.
    fn end(self, end: &End, fault: &AtomicI32) {
        let reason = match (end, fault.load(Ordering::Relaxed)) {
            (End::Finished, 0) => return,
            (End::Finished, errno) => {
                let error = io::Error::from_raw_os_error(errno);
                format!("the driver refused a command: {error}")
            }
            (failed, _) => failed.to_string(),
        };
        let mut state = self.ends.state();
        state.failure.get_or_insert((self.queue, reason));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.ends.state();
        state.running -= 1;
        state.any_ended = true;
        let on_end = state.on_end.take();
        drop(state);
        self.ends.changed.notify_all();
        // It may wait for the other threads.
        if let Some(on_end) = on_end {
            on_end();
        }
    }
}

impl QueueThreads {
    /// No threads yet.
    pub(super) fn new(id: u32) -> Self {
        Self {
            id,
            commands: Vec::new(),
            ends: Arc::default(),
        }
    }

    /// Starts a thread for each queue and waits until all are about to serve. Threads that were
    /// started before another one failed go on until they are told to end.
    pub(super) fn start<B: Storage>(
        &mut self,
        info: &sys::ublksrv_ctrl_dev_info,
        config: &UblkConfig,
        facts: &Facts,
        char_device: &Arc<File>,
        storage: &Arc<B>,
        mut counters: impl FnMut() -> Arc<Counters>,
    ) -> Result<(), UblkError> {
        let refusals = Arc::new(Refusals::new(self.id));
        let mut spawned: Vec<Spawned> = Vec::with_capacity(info.nr_hw_queues.into());
        for queue in 0..info.nr_hw_queues {
            let queue_config = QueueConfig {
                char_device: Arc::clone(char_device),
                queue,
                depth: info.queue_depth,
                buffer_bytes: info.max_io_buf_bytes,
                limits: storage.limits().clone(),
                counters: counters(),
                fault: Arc::new(AtomicI32::new(0)),
                refusals: Arc::clone(&refusals),
                refuse_writes: config.refuse_writes,
                data: facts.data,
                may_copy: facts.features.has(sys::UBLK_F_USER_COPY),
                threads: config.threads.clone(),
                throttle: Arc::clone(&config.throttle),
                longest_hold: match facts.features.has(sys::UBLK_F_UNPRIVILEGED_DEV) {
                    true => LONGEST_HOLD,
                    false => Duration::MAX,
                },
                cpus: (facts.affinity.as_ref()).map(|cpus| cpus[usize::from(queue)].clone()),
                insists: config.affinity == Some(true),
                sharing: storage.sharing(),
            };
            let ring_places = config.ring_places.unwrap_or(info.queue_depth);
            let thread = self.spawn(queue_config, ring_places, storage);
            spawned.push(thread.map_err(|error| self.failed(queue, &error))?);
        }
        let deadline = Instant::now() + THREAD_LIMIT;
        for (queue, thread) in (0..).zip(&spawned) {
            let left = deadline.saturating_duration_since(Instant::now());
            let started = thread.wait_started(left);
            started.map_err(|error| self.failed(queue, &error))?;
        }
        Ok(())
    }

    fn spawn<B: Storage>(
        &mut self,
        config: QueueConfig,
        ring_places: u16,
        storage: &Arc<B>,
    ) -> io::Result<Spawned> {
        let (commands, mailbox) = Mailbox::new()?;
        let queue = config.queue;
        let storage = Arc::clone(storage);
        let fault = Arc::clone(&config.fault);
        let make = move || make_loop(config, ring_places, &*storage, mailbox);
        let running = Running::new(&self.ends, queue);
        let on_end = move |end: End| running.end(&end, &fault);
        let spawned = spawn_queue(format!("ublk{}-q{queue}", self.id), make, on_end)?;
        self.commands.push(commands);
        Ok(spawned)
    }

    /// Notes why a queue could not be started.
    fn failed(&self, queue: u16, error: &io::Error) -> UblkError {
        let reason = error.to_string();
        let mut state = self.ends.state();
        let (queue, reason) = (state.failure).get_or_insert((queue, reason)).clone();
        UblkError::Queue {
            id: self.id,
            queue,
            reason,
        }
    }

    /// The switch for the writes of all queues.
    pub(super) fn gate(&self) -> WriteGate {
        WriteGate::new(self.id, self.commands.clone())
    }

    /// Calls `on_end` when a thread ends, on that thread: nothing else reports that the device lost
    /// a queue. If one has ended already, `on_end` is handed back.
    #[must_use]
    pub(super) fn watch(&self, on_end: OnEnd) -> Option<OnEnd> {
        let mut state = self.ends.state();
        if state.any_ended {
            return Some(on_end);
        }
        state.on_end = Some(on_end);
        None
    }

    /// Calls nothing any more when threads end: that is expected from now on.
    pub(super) fn unwatch(&self) -> Option<OnEnd> {
        self.ends.state().on_end.take()
    }

    /// Whether a thread has ended.
    pub(super) fn any_ended(&self) -> bool {
        self.ends.state().any_ended
    }

    /// Whether a queue failed.
    pub(super) fn any_failed(&self) -> bool {
        self.ends.state().failure.is_some()
    }

    /// The first failure, once.
    pub(super) fn take_failure(&self) -> Result<(), UblkError> {
        match self.ends.state().failure.take() {
            Some((queue, reason)) => Err(UblkError::Queue {
                id: self.id,
                queue,
                reason,
            }),
            None => Ok(()),
        }
    }

    /// Ends the threads without waiting for the device; see [`Command::Quit`].
    pub(super) fn quit(&self) {
        self.tell(|| Command::Quit);
    }

    /// Ends the threads after what the driver has handed out; see [`Command::Leave`].
    pub(super) fn leave(&self) {
        self.tell(|| Command::Leave);
    }

    /// Waits until the requests that are under way now have ended. Also a queue that has ended has none.
    ///
    /// # Errors
    ///
    /// When they have not after `limit`.
    pub(super) fn await_answers(&self, limit: Duration) -> Result<(), UblkError> {
        match await_all(&self.commands, limit, Command::AwaitAnswers) {
            Err((queue, RecvTimeoutError::Timeout)) => Err(UblkError::Unanswered {
                id: self.id,
                queue,
                limit,
            }),
            Ok(()) | Err((_, RecvTimeoutError::Disconnected)) => Ok(()),
        }
    }

    fn tell(&self, command: impl Fn() -> Command) {
        for queue in &self.commands {
            // One that has ended needs not be told.
            let _ = queue.send(command());
        }
    }

    /// Waits until all threads have ended. One that failed makes the others quit.
    pub(super) fn wait_ended(&self) -> Result<(), UblkError> {
        let deadline = Instant::now() + THREAD_LIMIT;
        let mut state = self.ends.state();
        let mut told = false;
        while state.running > 0 {
            if state.failure.is_some() && !told {
                told = true;
                drop(state);
                self.quit();
                state = self.ends.state();
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(UblkError::Stuck {
                    id: self.id,
                    threads: state.running,
                    limit: THREAD_LIMIT,
                });
            }
            state = (self.ends.changed.wait_timeout(state, left))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }
}

/// Puts the calling thread where the queue belongs, and makes its loop.
fn make_loop<B: Storage>(
    config: QueueConfig,
    ring_places: u16,
    storage: &B,
    mailbox: Mailbox<Command>,
) -> io::Result<QueueThread<UblkQueue, B>> {
    let counters = Arc::clone(&config.counters);
    let threads = config.threads.clone();
    let throttle = Arc::clone(&config.throttle);
    match &config.cpus {
        Some(cpus) if config.insists => settle_on(cpus)?,
        // Perhaps none of them is there now.
        Some(cpus) => settle_on(cpus).unwrap_or_else(
            |error| tracing::debug!(%error, queue = config.queue, "it runs anywhere"),
        ),
        None => threads.settle(config.queue)?,
    }
    let data = config.data;
    let queue = UblkQueue::new(config)?;
    let thread = QueueThread::new(queue, storage, mailbox, &counters, &threads, &throttle)?;
    if data == DataPath::ZeroCopy {
        thread.reserve_buffers(ring_places.into())?;
    }
    Ok(thread)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn threads(count: u16) -> (QueueThreads, Vec<Running>) {
        let threads = QueueThreads::new(0);
        let running = (0..count).map(|queue| Running::new(&threads.ends, queue));
        let running = running.collect();
        (threads, running)
    }

    fn finish(running: Running) {
        running.end(&End::Finished, &AtomicI32::new(0));
    }

    #[test]
    fn an_unexpected_end_is_reported_once_and_an_expected_one_is_not() {
        let (threads, mut running) = threads(3);
        let (report, reports) = mpsc::channel();
        let on_end = move || report.send(()).unwrap();
        assert!(threads.watch(Box::new(on_end)).is_none());
        finish(running.remove(0));
        assert_eq!(reports.try_recv(), Ok(()));
        finish(running.remove(0));
        assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Disconnected));

        let (threads, mut running) = self::threads(1);
        let (report, reports) = mpsc::channel();
        let on_end = move || report.send(()).unwrap();
        assert!(threads.watch(Box::new(on_end)).is_none());
        let on_end = threads.unwatch().unwrap();
        finish(running.remove(0));
        assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Empty));
        // Too late to be called by the thread.
        assert!(threads.watch(on_end).is_some());
    }

    #[test]
    fn the_first_failure_is_kept_and_the_others_quit_for_it() {
        let (mut threads, mut running) = threads(2);
        let (commands, mut mailbox) = Mailbox::new().unwrap();
        threads.commands.push(commands);
        let panicked = End::Panicked("a bug".into());
        running.remove(1).end(&panicked, &AtomicI32::new(0));
        let first = running.remove(0);
        let other = std::thread::spawn(move || {
            while !matches!(mailbox.take(), Some(Command::Quit)) {
                std::thread::yield_now();
            }
            first.end(&End::Finished, &AtomicI32::new(libc::EIO));
        });
        threads.wait_ended().unwrap();
        other.join().unwrap();
        let error = threads.take_failure().unwrap_err().to_string();
        assert!(error.contains("panicked: a bug"), "{error}");
        assert!(threads.any_ended() && !threads.any_failed());
    }
}
