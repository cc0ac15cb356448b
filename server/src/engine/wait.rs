//! Waiting for a state that no event reports.

use std::thread;
use std::time::{Duration, Instant};

/// Repeats `attempt` while its result is one to try `again` for, with a pause of `interval` between
/// two attempts and for at most `limit`. Returns the last result.
pub fn repeat_while<T>(
    limit: Duration,
    interval: Duration,
    mut attempt: impl FnMut() -> T,
    again: impl Fn(&T) -> bool,
) -> T {
    let deadline = Instant::now() + limit;
    loop {
        let result = attempt();
        if !again(&result) || Instant::now() >= deadline {
            return result;
        }
        thread::sleep(interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn the_first_result_that_is_not_to_be_repeated_is_returned() {
        let mut count = 0;
        let attempt = || {
            count += 1;
            count
        };
        let got = repeat_while(Duration::from_secs(60), SHORT, attempt, |count| *count < 3);
        assert_eq!(got, 3);
    }

    #[test]
    fn the_last_result_is_returned_when_the_time_is_over() {
        let begun = Instant::now();
        let got = repeat_while(20 * SHORT, SHORT, || Err::<(), _>("busy"), Result::is_err);
        assert_eq!(got, Err("busy"));
        assert!(begun.elapsed() >= 20 * SHORT);
        // One attempt is made in any case.
        assert_eq!(repeat_while(Duration::ZERO, SHORT, || 1, |_| true), 1);
    }
}
