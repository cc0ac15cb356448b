//! Whether a thread that has nothing to do looks for work, or sleeps until it is woken.
//!
//! A wake-up costs the client a system call and both sides the way through the scheduler: some
//! microseconds on bare metal, tens of them on a virtual machine. Whoever looks for work all the
//! time answers at once and needs no notification, and pays with a processor. The adaptive way looks
//! only where the work that came of late came soon enough.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::engine::cpus::processors_online;

/// What a thread does when it has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Polling {
    /// Sleeps.
    Never,
    /// Looks for work for as long as this at most, where that has paid off lately; then sleeps.
    Adaptive(Duration),
    /// Looks for work, and never sleeps.
    Always,
}

/// Longest `--poll-us` that is accepted. Beyond it a wake-up is not worth mentioning.
const MAX_POLL_US: u32 = 1_000_000;

/// The longest time that an idle thread looks for work when nobody says: two wake-ups on a virtual
/// machine, so that a client that sleeps at depth 1 finds the thread awake (docs/benchmarks.md).
const DEFAULT_POLL_US: u32 = 100;

impl Default for Polling {
    fn default() -> Self {
        Self::Adaptive(Duration::from_micros(DEFAULT_POLL_US.into()))
    }
}

/// Why a text says nothing about polling.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is neither a number of microseconds (0 to {MAX_POLL_US}) nor 'always'")]
pub struct BadPolling(String);

impl FromStr for Polling {
    type Err = BadPolling;

    fn from_str(text: &str) -> Result<Self, BadPolling> {
        if text == "always" {
            return Ok(Self::Always);
        }
        match text.parse::<u32>() {
            Ok(0) => Ok(Self::Never),
            Ok(longest @ ..=MAX_POLL_US) => {
                Ok(Self::Adaptive(Duration::from_micros(longest.into())))
            }
            _ => Err(BadPolling(text.to_owned())),
        }
    }
}

impl fmt::Display for Polling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("0"),
            Self::Adaptive(longest) => write!(f, "{}", longest.as_micros()),
            Self::Always => f.write_str("always"),
        }
    }
}

impl serde::Serialize for Polling {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Polling {
    /// A number of microseconds, or a text like on the command line.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(untagged, expecting = "a number of microseconds or \"always\"")]
        enum Either {
            Number(u32),
            Text(String),
        }
        let text = match Either::deserialize(deserializer)? {
            Either::Number(number) => number.to_string(),
            Either::Text(text) => text,
        };
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Confidence that looking pays off: what it is at most, and from where on it is acted upon.
const SURE: u8 = 8;
const LIKELY: u8 = 4;

/// What one late arrival costs of it.
const DOUBT: u8 = 2;

/// Requests under way up to which an adaptive thread looks. With more of them nobody waits for this
/// thread alone, and a nap collects several completions for one wake-up.
const FEW: usize = 1;

/// Requests that come back from the storage between two idle times on the average, from which on a wake-up
/// is shared by many that took their time anyway; looking then pays only where work comes very soon:
/// within this part of the longest time.
const MANY: u64 = 4;
const VERY_SOON: u32 = 4;

/// Averages follow a change within about so many idle times.
const MEMORY: u32 = 8;

/// Idle times in a row for which a thread looks for a moment before it reads the clock, which takes as
/// long as a small request.
const GLANCES: u32 = 256;

/// How often a thread that looks asks whether others need its processor.
const WINDOW: Duration = Duration::from_millis(10);

/// The part of a window, one in so many, for which the thread may wait for a processor before it takes
/// the hint.
const TOLERATED_WAIT: u32 = 10;

/// How long a thread does without looking after that, at first and at most.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
const LONG_PAUSE: Duration = Duration::from_secs(2);

/// Decides for one thread; learns from how long it was idle each time.
#[derive(Debug)]
pub(crate) struct Poller {
    polling: Polling,
    idle_since: Option<Instant>,
    confidence: u8,
    /// How long idle times are on the average.
    idle: Duration,
    /// Requests that came back from the storage since the last idle time, and how many do on the
    /// average, times [`MEMORY`].
    came_back: u64,
    burst: u64,
    /// Idle times since the clock was read last.
    glances: u32,
    /// Whether all clients run on the thread's own processor, and there is only that one.
    beside_clients: bool,
    crowd: Crowd,
    waits: Waits,
}

impl Poller {
    /// A poller for the calling thread; `beside_clients` if all who send it requests can do so only from
    /// the one processor that it runs on.
    pub(crate) fn new(polling: Polling, beside_clients: bool) -> Self {
        // Not how many this thread may use: a client has others.
        let alone = processors_online() == 1;
        Self {
            // Whoever has the only processor keeps away what it looks for.
            polling: match polling {
                Polling::Adaptive(_) if alone => Polling::Never,
                other => other,
            },
            idle_since: None,
            confidence: 0,
            idle: Duration::ZERO,
            came_back: 0,
            burst: 0,
            glances: 0,
            beside_clients,
            crowd: Crowd::default(),
            waits: Waits::open(),
        }
    }

    /// There was work; `came_back` requests ended that the storage had.
    pub(crate) fn worked(&mut self, came_back: u64) {
        if let Some(since) = self.idle_since.take() {
            self.learn(since.elapsed());
        }
        self.came_back += came_back;
    }

    fn learn(&mut self, idle: Duration) {
        let Polling::Adaptive(longest) = self.polling else {
            return;
        };
        let burst = std::mem::take(&mut self.came_back);
        self.burst = self.burst - self.burst / u64::from(MEMORY) + burst;
        // What is late is late; how much does not matter.
        self.idle = self.idle - self.idle / MEMORY + idle.min(2 * longest) / MEMORY;
        self.confidence = if idle <= longest {
            SURE.min(self.confidence + 1)
        } else {
            self.confidence.saturating_sub(DOUBT)
        };
    }

    /// Whether looking pays off as far as is known without a clock.
    fn pays(&self, longest: Duration, under_way: usize) -> bool {
        self.confidence >= LIKELY
            && under_way <= FEW
            && !self.keeps_away(under_way)
            && (self.burst < MANY * u64::from(MEMORY) || self.idle <= longest / VERY_SOON)
    }

    /// Whether the thread would keep away what it looks for: it has the clients' processor, and the storage
    /// nothing that could come back.
    fn keeps_away(&self, under_way: usize) -> bool {
        self.beside_clients && under_way == 0
    }

    /// There is nothing to do: whether to look for a moment, before [`look`](Self::look) is asked.
    pub(crate) fn glances(&mut self, under_way: usize) -> bool {
        let Polling::Adaptive(longest) = self.polling else {
            return false;
        };
        let may = self.idle_since.is_none()
            && self.glances < GLANCES
            && self.crowd.pause_until.is_none()
            && self.pays(longest, under_way);
        self.glances += u32::from(may);
        may
    }

    /// There was work in that moment.
    pub(crate) fn came_at_once(&mut self) {
        self.learn(Duration::ZERO);
    }

    /// There is nothing to do, and `under_way` requests are with the storage: until when to look for
    /// work.
    pub(crate) fn look(&mut self, under_way: usize) -> Look {
        match self.polling {
            Polling::Never => Look::Sleep,
            Polling::Always => Look::ForEver,
            // Nor is anything learned from how long that takes.
            Polling::Adaptive(_) if self.keeps_away(under_way) => Look::Sleep,
            Polling::Adaptive(longest) => {
                let since = *self.idle_since.get_or_insert_with(Instant::now);
                self.glances = 0;
                if self.pays(longest, under_way)
                    && !self.crowd.is_waiting(since, || self.waits.so_far())
                {
                    Look::Until(since + longest)
                } else {
                    Look::Sleep
                }
            }
        }
    }
}

/// Whether others want the processor that a thread looks for work on: then looking takes from them,
/// perhaps from the very client that it looks for.
#[derive(Debug, Default)]
struct Crowd {
    /// Beginning of the window, and how long the thread had waited for a processor then.
    window: Option<(Instant, Duration)>,
    /// No looking before this.
    pause_until: Option<Instant>,
    pause: Duration,
}

impl Crowd {
    fn is_waiting(&mut self, now: Instant, waited: impl FnOnce() -> Duration) -> bool {
        if let Some(end) = self.pause_until {
            if now < end {
                return true;
            }
            self.pause_until = None;
            self.window = Some((now, waited()));
            return false;
        }
        let Some((begin, before)) = self.window else {
            self.window = Some((now, waited()));
            return false;
        };
        let length = now.saturating_duration_since(begin);
        if length < WINDOW {
            return false;
        }
        let waited = waited();
        self.window = Some((now, waited));
        if waited.saturating_sub(before) <= length / TOLERATED_WAIT {
            self.pause = Duration::ZERO;
            return false;
        }
        self.pause = (self.pause * 2).clamp(SHORT_PAUSE, LONG_PAUSE);
        self.pause_until = Some(now + self.pause);
        true
    }
}

/// How long the thread that opened it has been ready to run while others ran: the second number of
/// `/proc/thread-self/schedstat` (Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Default)]
struct Waits(Option<File>);

impl Waits {
    fn open() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// Zero where the kernel does not tell.
    fn so_far(&self) -> Duration {
        let mut text = [0; 64];
        let read = self.0.as_ref().map(|file| file.read_at(&mut text, 0));
        let len = read.and_then(Result::ok).unwrap_or(0);
        std::str::from_utf8(&text[..len])
            .ok()
            .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok())
            .map_or(Duration::ZERO, Duration::from_nanos)
    }
}

/// What an idle thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    Sleep,
    Until(Instant),
    ForEver,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::threads::ThreadOptions;

    const LONGEST: Duration = Duration::from_micros(100);
    const SOON: Duration = Duration::from_micros(99);
    const LATE: Duration = Duration::from_micros(101);

    fn poller(polling: Polling) -> Poller {
        Poller {
            polling,
            idle_since: None,
            confidence: 0,
            idle: Duration::ZERO,
            came_back: 0,
            burst: 0,
            glances: 0,
            beside_clients: false,
            crowd: Crowd::default(),
            waits: Waits::default(),
        }
    }

    fn looks(poller: &mut Poller, under_way: usize) -> bool {
        poller.look(under_way) != Look::Sleep
    }

    #[test]
    fn what_people_write_is_understood_and_written_back() {
        for text in ["0", "1", "1000000", "always"] {
            assert_eq!(text.parse::<Polling>().unwrap().to_string(), text);
        }
        for text in ["", "-1", "1000001", "Always", "1.5"] {
            assert!(text.parse::<Polling>().is_err(), "{text}");
        }
        assert_eq!("0".parse(), Ok(Polling::Never));
    }

    #[test]
    fn a_thread_looks_once_work_came_soon_several_times_and_stops_when_it_comes_late() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        assert!(!looks(&mut poller, 0));
        for _ in 0..LIKELY {
            assert!(!looks(&mut poller, 0));
            poller.learn(SOON);
        }
        assert!(looks(&mut poller, 0));
        for _ in 0..100 {
            poller.learn(SOON);
        }
        // However sure it was: the core is given back after a few times in vain.
        for _ in 0..(SURE - LIKELY) / DOUBT + 1 {
            assert!(looks(&mut poller, 0));
            poller.learn(LATE);
        }
        assert!(!looks(&mut poller, 0));
    }

    #[test]
    fn work_that_comes_late_as_often_as_soon_is_slept_for() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        for _ in 0..100 {
            poller.learn(SOON);
            poller.learn(LATE);
            assert!(!looks(&mut poller, 0));
        }
    }

    #[test]
    fn a_thread_sleeps_while_the_storage_has_much_to_do() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        (0..SURE).for_each(|_| poller.learn(SOON));
        assert!(looks(&mut poller, FEW));
        assert!(!looks(&mut poller, FEW + 1));
    }

    #[test]
    fn a_thread_on_the_processor_of_its_clients_looks_for_what_the_storage_has_and_for_nothing_else()
     {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        poller.beside_clients = true;
        (0..SURE).for_each(|_| poller.learn(SOON));
        assert!(!poller.glances(0) && !looks(&mut poller, 0));
        std::thread::sleep(LATE);
        poller.worked(1);
        assert_eq!(poller.confidence, SURE, "how long that took says nothing");
        assert!(looks(&mut poller, FEW));
        poller.polling = Polling::Always;
        assert!(looks(&mut poller, 0), "it was told to");
    }

    #[test]
    fn a_thread_whose_processor_others_need_pauses_longer_each_time() {
        let (mut crowd, start) = (Crowd::default(), Instant::now());
        let mut at = |millis, waited_micros: Option<u64>| {
            crowd.is_waiting(start + Duration::from_millis(millis), || {
                Duration::from_micros(waited_micros.expect("nobody has to ask"))
            })
        };
        assert!(!at(0, Some(7000)));
        assert!(!at(9, None), "too soon to ask");
        assert!(!at(10, Some(8000)), "a tenth is nothing");
        assert!(at(20, Some(9001)));
        assert!(at(119, None), "in the pause");
        assert!(!at(120, Some(50_000)), "not its own doing");
        assert!(at(130, Some(51_001)));
        assert!(at(329, None), "in the longer pause");
        assert!(!at(330, Some(51_001)));
        assert!(!at(340, Some(51_001)), "it is quiet again");
        assert!(at(350, Some(52_002)));
        assert!(!at(450, Some(52_002)), "a short pause again");
        assert!(!at(1450, Some(152_002)), "a tenth of a longer window");
    }

    #[test]
    fn pauses_have_an_end() {
        let (mut crowd, mut now) = (Crowd::default(), Instant::now());
        let mut waited = Duration::ZERO;
        for _ in 0..20 {
            crowd.is_waiting(now, || waited);
            waited += WINDOW;
            now += WINDOW;
            if crowd.is_waiting(now, || waited) {
                now += LONG_PAUSE;
            }
        }
        assert_eq!(crowd.pause, LONG_PAUSE);
    }

    #[test]
    fn the_kernel_tells_how_long_a_thread_waited_for_a_processor() {
        assert_eq!(Waits::default().so_far(), Duration::ZERO);
        // SAFETY: asks where the thread is.
        let here = unsafe { libc::sched_getcpu() };
        let threads: Vec<_> = (0..2)
            .map(|_| {
                std::thread::spawn(move || {
                    // Both on one processor, until one of them has waited for it.
                    let cpus = ThreadOptions {
                        cpus: Some(here.to_string().parse().unwrap()),
                        ..ThreadOptions::default()
                    };
                    cpus.settle(0).unwrap();
                    let (waits, start) = (Waits::open(), Instant::now());
                    let mut last = Duration::ZERO;
                    while last == Duration::ZERO && start.elapsed() < Duration::from_secs(60) {
                        std::hint::spin_loop();
                        last = waits.so_far();
                    }
                    last
                })
            })
            .collect();
        let waited = threads.into_iter().map(|thread| thread.join().unwrap());
        assert!(waited.max() > Some(Duration::ZERO));
    }

    #[test]
    fn the_time_without_work_counts_from_its_beginning_whatever_happens_in_between() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        (0..SURE).for_each(|_| poller.learn(SOON));
        let first = poller.look(0);
        assert_eq!(poller.look(0), first);
        std::thread::sleep(LATE);
        poller.worked(1);
        assert_eq!(poller.confidence, SURE - DOUBT);
        poller.worked(1);
        assert_eq!(
            poller.confidence,
            SURE - DOUBT,
            "there was no time without work"
        );
        assert_ne!(poller.look(0), first);
    }

    #[test]
    fn a_thread_that_gets_much_at_once_from_the_storage_looks_only_for_what_comes_very_soon() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        let mut come = |came_back, idle| {
            for _ in 0..100 {
                poller.came_back += came_back;
                poller.learn(idle);
            }
            looks(&mut poller, 0)
        };
        let very_soon = LONGEST / (VERY_SOON + 1);
        assert!(come(1, SOON));
        assert!(come(1, very_soon));
        assert!(come(32, very_soon));
        assert!(!come(32, SOON));
        assert!(come(1, SOON), "it learns again");
    }

    #[test]
    fn a_thread_that_looks_anyway_reads_the_clock_now_and_then_only() {
        let mut poller = poller(Polling::Adaptive(LONGEST));
        assert!(!poller.glances(0), "nothing is known yet");
        (0..SURE).for_each(|_| poller.learn(SOON));
        assert!(!poller.glances(FEW + 1));
        for _ in 0..GLANCES {
            assert!(poller.glances(0));
            poller.came_at_once();
        }
        assert!(poller.confidence == SURE && poller.idle < LONGEST / 100);
        assert!(!poller.glances(0), "others may need the processor");
        let first = poller.look(0);
        assert!(!poller.glances(0), "the idle time goes on");
        assert_eq!(poller.look(0), first);
        poller.worked(0);
        assert!(poller.glances(0));
        poller.worked(0);
        poller.crowd.pause_until = Some(Instant::now() + LONG_PAUSE);
        assert!(!poller.glances(0));
    }

    #[test]
    fn never_and_always_learn_nothing() {
        let mut never = poller(Polling::Never);
        let mut always = poller(Polling::Always);
        for poller in [&mut never, &mut always] {
            (0..SURE).for_each(|_| poller.learn(SOON));
        }
        assert_eq!(never.look(0), Look::Sleep);
        assert_eq!(always.look(1000), Look::ForEver);
    }
}
