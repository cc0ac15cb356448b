//! Waiting for a condition that nothing announces.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long [`eventually`] waits: generous, for slow machines.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The pause after the first attempt; each one is twice as long as the one before it, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(2);

/// What is asked may start a process: more of them would take the processor from what is waited for.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Asks again and again until there is an answer.
///
/// # Errors
/// An attempt failed, or `limit` has passed: it did not happen that `what`.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut pause = FIRST_PAUSE;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("within {} s it did not happen that {what}", limit.as_secs());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Waits until a condition holds.
///
/// # Errors
/// As [`wait_for`].
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    wait_for(what, limit, || Ok(holds()?.then_some(())))
}

/// As [`until`], for tests that panic.
///
/// # Panics
/// It did not happen that `what` within [`PATIENCE`].
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    if let Err(error) = until(what, PATIENCE, || Ok(holds())) {
        panic!("{error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_happens_is_named_in_time() {
        let never = until("pigs fly", Duration::from_millis(20), || Ok(false));
        assert!(never.expect_err("never").to_string().contains("pigs fly"));
        let failed = wait_for::<()>("", PATIENCE, || bail!("broken"));
        assert_eq!(failed.expect_err("it fails").to_string(), "broken");
    }

    #[test]
    fn the_first_answer_ends_the_wait() {
        let mut left = 3;
        let answer = wait_for("three attempts", PATIENCE, || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(answer.expect("there is an answer"), "done");
    }
}
