//! Whether other threads want the processor that a thread polls on.
//!
//! Polling then takes time from them, perhaps from the very client whose requests are polled for.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

/// How often a polling thread checks for contention.
const WINDOW: Duration = Duration::from_millis(10);

/// A thread tolerates having waited for a processor during this fraction of a window (one in so many).
const TOLERATED_WAIT: u32 = 10;

/// How long a thread does not poll after contention, at first and at most.
const SHORT_PAUSE: Duration = Duration::from_millis(100);
const LONG_PAUSE: Duration = Duration::from_secs(2);

/// Pauses polling while the thread's run-queue delay shows that others wait for its processor.
#[derive(Debug, Default)]
pub(super) struct Contention {
    /// Beginning of the window, and the thread's run-queue delay then.
    window: Option<(Instant, Duration)>,
    /// No polling before this.
    pause_until: Option<Instant>,
    pause: Duration,
}

impl Contention {
    /// Whether the last check began a pause that no later check has ended.
    pub(super) fn is_paused(&self) -> bool {
        self.pause_until.is_some()
    }

    /// Whether the thread shall not poll at `now`; `delay` reads its run-queue delay so far.
    pub(super) fn check(&mut self, now: Instant, delay: impl FnOnce() -> Duration) -> bool {
        if let Some(end) = self.pause_until {
            if now < end {
                return true;
            }
            self.pause_until = None;
            self.window = Some((now, delay()));
            return false;
        }
        let Some((begin, before)) = self.window else {
            self.window = Some((now, delay()));
            return false;
        };
        let length = now.saturating_duration_since(begin);
        if length < WINDOW {
            return false;
        }
        let delay = delay();
        self.window = Some((now, delay));
        if delay.saturating_sub(before) <= length / TOLERATED_WAIT {
            self.pause = Duration::ZERO;
            return false;
        }
        self.pause = (self.pause * 2).clamp(SHORT_PAUSE, LONG_PAUSE);
        self.pause_until = Some(now + self.pause);
        true
    }
}

/// Reads how long the thread that opened it has been runnable while others ran: the second number of
/// `/proc/thread-self/schedstat` (Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Default)]
pub(super) struct RunDelay(Option<File>);

impl RunDelay {
    pub(super) fn open() -> Self {
        Self(File::open("/proc/thread-self/schedstat").ok())
    }

    /// Zero where the kernel has no schedstats (`CONFIG_SCHED_INFO`).
    pub(super) fn so_far(&self) -> Duration {
        let mut text = [0; 64];
        let read = self.0.as_ref().map(|file| file.read_at(&mut text, 0));
        let len = read.and_then(Result::ok).unwrap_or(0);
        std::str::from_utf8(&text[..len])
            .ok()
            .and_then(|text| text.split_ascii_whitespace().nth(1)?.parse().ok())
            .map_or(Duration::ZERO, Duration::from_nanos)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpus::{Cpus, settle_on};

    #[test]
    fn a_thread_whose_processor_others_need_pauses_longer_each_time() {
        let (mut contention, start) = (Contention::default(), Instant::now());
        let mut at = |millis, delay_us: Option<u64>| {
            contention.check(start + Duration::from_millis(millis), || {
                Duration::from_micros(delay_us.expect("the delay need not be read"))
            })
        };
        assert!(!at(0, Some(7000)));
        assert!(!at(9, None), "the window has not passed");
        assert!(!at(10, Some(8000)), "a tenth is tolerated");
        assert!(at(20, Some(9001)));
        assert!(at(119, None), "in the pause");
        assert!(
            !at(120, Some(50_000)),
            "the thread did not run in the pause"
        );
        assert!(at(130, Some(51_001)));
        assert!(at(329, None), "in the longer pause");
        assert!(!at(330, Some(51_001)));
        assert!(!at(340, Some(51_001)), "no contention any more");
        assert!(at(350, Some(52_002)));
        assert!(!at(450, Some(52_002)), "a short pause again");
        assert!(!at(1450, Some(152_002)), "a tenth of a longer window");
    }

    #[test]
    fn pauses_are_bounded() {
        let (mut contention, mut now) = (Contention::default(), Instant::now());
        let mut delay = Duration::ZERO;
        for _ in 0..20 {
            contention.check(now, || delay);
            delay += WINDOW;
            now += WINDOW;
            if contention.check(now, || delay) {
                now += LONG_PAUSE;
            }
        }
        assert_eq!(contention.pause, LONG_PAUSE);
    }

    #[test]
    fn the_kernel_tells_how_long_a_thread_waited_for_a_processor() {
        assert_eq!(RunDelay::default().so_far(), Duration::ZERO);
        // SAFETY: asks where the thread is.
        let here = u16::try_from(unsafe { libc::sched_getcpu() }).unwrap();
        let threads: Vec<_> = (0..2)
            .map(|_| {
                std::thread::spawn(move || {
                    // Both on one processor, until one of them has waited for it.
                    settle_on(&Cpus::from(here)).unwrap();
                    let (delay, start) = (RunDelay::open(), Instant::now());
                    let mut last = Duration::ZERO;
                    while last == Duration::ZERO && start.elapsed() < Duration::from_secs(60) {
                        std::hint::spin_loop();
                        last = delay.so_far();
                    }
                    last
                })
            })
            .collect();
        let delays = threads.into_iter().map(|thread| thread.join().unwrap());
        assert!(delays.max() > Some(Duration::ZERO));
    }
}
