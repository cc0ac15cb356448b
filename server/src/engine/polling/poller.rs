//! Decides, for one queue thread, whether it polls when it is idle or sleeps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::contention::{Contention, RunDelay};
use super::option::{Polling, SharedPolling};
use crate::engine::cpus::processors_online;

/// Confidence that polling pays off: its maximum, and the threshold from which the thread polls.
const MAX_CONFIDENCE: u8 = 8;
const POLL_CONFIDENCE: u8 = 4;

/// What one late arrival costs of it.
const LATE_PENALTY: u8 = 2;

/// Requests in flight up to which an adaptive thread polls. With more of them no client waits for this
/// thread alone, and sleeping collects several completions per wake-up.
const MAX_IN_FLIGHT: usize = 1;

/// Average number of storage completions per idle time from which one wake-up serves several requests.
/// Polling then pays only for work that arrives within `longest / QUICK_DIVISOR`.
const BURST: u64 = 4;
const QUICK_DIVISOR: u32 = 4;

/// Averages follow a change within about so many idle times.
const AVERAGE_OVER: u32 = 8;

/// Consecutive idle times for which a thread polls briefly before it reads the clock, which takes as
/// long as a small request.
const BRIEF_POLLS: u32 = 256;

/// What an idle thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IdleAction {
    Sleep,
    PollUntil(Instant),
    PollForEver,
}

/// Learns from how long the thread was idle each time.
#[derive(Debug)]
pub(crate) struct Poller {
    /// What the thread was told, and what it makes of that.
    shared: Arc<SharedPolling>,
    told: Polling,
    polling: Polling,
    idle_since: Option<Instant>,
    confidence: u8,
    /// Average length of idle times.
    idle: Duration,
    /// Requests that the storage completed since the last idle time.
    completed: u64,
    /// Their average per idle time, times [`AVERAGE_OVER`].
    burst: u64,
    /// Idle times since the clock was last read.
    brief_polls: u32,
    /// Whether all clients run on the one processor that the thread may use.
    beside_clients: bool,
    contention: Contention,
    run_delay: RunDelay,
}

impl Poller {
    /// A poller for the calling thread. With `beside_clients` all its clients can run only on the one
    /// processor that the thread may use.
    pub(crate) fn new(polling: &Arc<SharedPolling>, beside_clients: bool) -> Self {
        let mut poller = Self {
            beside_clients,
            run_delay: RunDelay::open(),
            ..Self::untaught(Arc::clone(polling))
        };
        poller.learn_anew();
        poller
    }

    /// Follows what it was told last.
    fn learn_anew(&mut self) {
        self.told = self.shared.get();
        // All processors, not only those of this thread: a client may run on the others.
        let uniprocessor = processors_online() == 1;
        self.polling = match self.told {
            // On one processor, polling starves the client that is polled for.
            Polling::Adaptive(_) if uniprocessor => Polling::Never,
            other => other,
        };
        (self.idle_since, self.confidence, self.brief_polls) = (None, 0, 0);
        (self.idle, self.completed, self.burst) = (Duration::ZERO, 0, 0);
        self.contention = Contention::default();
    }

    /// Whether it was told something else since it decided.
    pub(crate) fn is_told_otherwise(&self) -> bool {
        self.shared.get() != self.told
    }

    fn untaught(shared: Arc<SharedPolling>) -> Self {
        let polling = shared.get();
        Self {
            shared,
            told: polling,
            polling,
            idle_since: None,
            confidence: 0,
            idle: Duration::ZERO,
            completed: 0,
            burst: 0,
            brief_polls: 0,
            beside_clients: false,
            contention: Contention::default(),
            run_delay: RunDelay::default(),
        }
    }

    /// There was work; the storage had completed `completed` requests.
    pub(crate) fn worked(&mut self, completed: u64) {
        if let Some(since) = self.idle_since.take() {
            self.learn(since.elapsed());
        }
        self.completed += completed;
    }

    fn learn(&mut self, idle: Duration) {
        let Polling::Adaptive(longest) = self.polling else {
            return;
        };
        let burst = std::mem::take(&mut self.completed);
        self.burst = self.burst - self.burst / u64::from(AVERAGE_OVER) + burst;
        // Outliers are clamped.
        self.idle = self.idle - self.idle / AVERAGE_OVER + idle.min(2 * longest) / AVERAGE_OVER;
        self.confidence = if idle <= longest {
            MAX_CONFIDENCE.min(self.confidence + 1)
        } else {
            self.confidence.saturating_sub(LATE_PENALTY)
        };
    }

    /// Whether polling pays off, as far as is known without reading the clock.
    fn pays(&self, longest: Duration, in_flight: usize) -> bool {
        self.confidence >= POLL_CONFIDENCE
            && in_flight <= MAX_IN_FLIGHT
            && !self.starves_clients(in_flight)
            && (self.burst < BURST * u64::from(AVERAGE_OVER)
                || self.idle <= longest / QUICK_DIVISOR)
    }

    /// Whether polling would keep the clients from making requests: the thread has their processor, and
    /// the storage has nothing that could complete meanwhile.
    fn starves_clients(&self, in_flight: usize) -> bool {
        self.beside_clients && in_flight == 0
    }

    /// Whether an idle thread shall poll briefly before it asks for [`idle_action`](Self::idle_action).
    pub(crate) fn polls_briefly(&mut self, in_flight: usize) -> bool {
        if self.is_told_otherwise() {
            self.learn_anew();
        }
        let Polling::Adaptive(longest) = self.polling else {
            return false;
        };
        let may = self.idle_since.is_none()
            && self.brief_polls < BRIEF_POLLS
            && !self.contention.is_paused()
            && self.pays(longest, in_flight);
        self.brief_polls += u32::from(may);
        may
    }

    /// The brief poll found work.
    pub(crate) fn found_at_once(&mut self) {
        self.learn(Duration::ZERO);
    }

    /// What an idle thread does while the storage has `in_flight` requests.
    pub(crate) fn idle_action(&mut self, in_flight: usize) -> IdleAction {
        match self.polling {
            Polling::Never => IdleAction::Sleep,
            Polling::Always => IdleAction::PollForEver,
            // Nor is anything learned from how long this takes.
            Polling::Adaptive(_) if self.starves_clients(in_flight) => IdleAction::Sleep,
            Polling::Adaptive(longest) => {
                let since = *self.idle_since.get_or_insert_with(Instant::now);
                self.brief_polls = 0;
                if self.pays(longest, in_flight)
                    && !self.contention.check(since, || self.run_delay.so_far())
                {
                    IdleAction::PollUntil(since + longest)
                } else {
                    IdleAction::Sleep
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(100);
    const SOON: Duration = Duration::from_micros(99);
    const LATE: Duration = Duration::from_micros(101);

    fn adaptive() -> Poller {
        Poller::untaught(Arc::new(Polling::Adaptive(LONGEST).into()))
    }

    fn confident() -> Poller {
        let mut poller = adaptive();
        (0..MAX_CONFIDENCE).for_each(|_| poller.learn(SOON));
        poller
    }

    #[test]
    fn a_thread_follows_what_it_is_told_while_it_runs() {
        let shared = Arc::new(SharedPolling::from(Polling::Never));
        let mut poller = Poller::new(&shared, false);
        let mut decides = |told: Polling| {
            shared.set(told);
            poller.polls_briefly(0);
            assert!(!poller.is_told_otherwise());
            let action = poller.idle_action(0);
            shared.set(Polling::Adaptive(LONGEST));
            assert!(poller.is_told_otherwise());
            action
        };
        for _ in 0..2 {
            assert_eq!(decides(Polling::Always), IdleAction::PollForEver);
            assert_eq!(decides(Polling::Never), IdleAction::Sleep);
        }
    }

    fn polls(poller: &mut Poller, in_flight: usize) -> bool {
        poller.idle_action(in_flight) != IdleAction::Sleep
    }

    #[test]
    fn a_thread_polls_once_work_came_soon_several_times_and_stops_when_it_comes_late() {
        let mut poller = adaptive();
        let learned = |poller: &mut Poller, idle, limit: u32, wanted| {
            let times = (0..=limit).find(|_| {
                let done = polls(poller, 0) == wanted;
                if !done {
                    poller.learn(idle);
                }
                done
            });
            times.is_some_and(|times| times > 0)
        };
        assert!(learned(&mut poller, SOON, 20, true));
        (0..100).for_each(|_| poller.learn(SOON));
        assert!(learned(&mut poller, LATE, 20, false));
    }

    #[test]
    fn work_that_comes_late_as_often_as_soon_is_slept_for() {
        let mut poller = adaptive();
        for _ in 0..100 {
            poller.learn(SOON);
            poller.learn(LATE);
            assert!(!polls(&mut poller, 0));
        }
    }

    #[test]
    fn a_thread_sleeps_while_the_storage_has_much_to_do() {
        let mut poller = confident();
        assert!(polls(&mut poller, 1));
        assert!(!polls(&mut poller, 32));
    }

    #[test]
    fn a_thread_on_its_clients_only_processor_polls_only_for_the_storage() {
        let mut poller = confident();
        poller.beside_clients = true;
        assert!(!poller.polls_briefly(0) && !polls(&mut poller, 0));
        std::thread::sleep(LATE);
        poller.worked(1);
        assert!(polls(&mut poller, 1), "nothing was learned from that time");
        poller.polling = Polling::Always;
        assert!(polls(&mut poller, 0), "--poll-us always");
    }

    #[test]
    fn an_idle_time_counts_from_its_beginning_whatever_happens_in_between() {
        let mut poller = confident();
        let first = poller.idle_action(0);
        assert_eq!(poller.idle_action(0), first);
        std::thread::sleep(LATE);
        poller.worked(1);
        let learned = poller.confidence;
        assert!(learned < MAX_CONFIDENCE);
        poller.worked(1);
        assert_eq!(poller.confidence, learned, "there was no idle time");
        assert_ne!(poller.idle_action(0), first);
    }

    #[test]
    fn a_thread_that_gets_bursts_from_the_storage_polls_only_for_what_comes_very_soon() {
        let mut poller = adaptive();
        let mut polls_after = |completed, idle| {
            for _ in 0..100 {
                poller.completed += completed;
                poller.learn(idle);
            }
            polls(&mut poller, 0)
        };
        let very_soon = LONGEST / (QUICK_DIVISOR + 1);
        assert!(polls_after(1, SOON));
        assert!(polls_after(32, very_soon));
        assert!(!polls_after(32, SOON));
        assert!(polls_after(1, SOON), "it learns again");
    }

    #[test]
    fn a_thread_that_polls_anyway_reads_the_clock_only_now_and_then() {
        let mut poller = adaptive();
        assert!(!poller.polls_briefly(0), "nothing is known yet");
        let mut poller = confident();
        assert!(!poller.polls_briefly(32));
        for _ in 0..BRIEF_POLLS {
            assert!(poller.polls_briefly(0));
            poller.found_at_once();
        }
        assert!(!poller.polls_briefly(0), "the clock must be read again");
        let first = poller.idle_action(0);
        assert!(!poller.polls_briefly(0), "the idle time goes on");
        assert_eq!(poller.idle_action(0), first);
        poller.worked(0);
        assert!(poller.polls_briefly(0));
    }

    #[test]
    fn never_and_always_learn_nothing() {
        for (polling, action) in [
            (Polling::Never, IdleAction::Sleep),
            (Polling::Always, IdleAction::PollForEver),
        ] {
            let mut poller = Poller::untaught(Arc::new(polling.into()));
            (0..MAX_CONFIDENCE).for_each(|_| poller.learn(SOON));
            assert_eq!(poller.idle_action(1000), action);
        }
    }
}
