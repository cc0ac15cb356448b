//! Two things at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Result, anyhow};

/// Runs `meanwhile` in a thread while `work` runs here, and sets its flag when that has ended. What
/// both return; the error of `work`, if both fail.
pub fn beside<A: Send, B>(
    meanwhile: impl FnOnce(&AtomicBool) -> Result<A> + Send,
    work: impl FnOnce() -> Result<B>,
) -> Result<(A, B)> {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let meanwhile = scope.spawn(|| meanwhile(&over));
        let worked = work();
        over.store(true, Ordering::Relaxed);
        let other = meanwhile.join();
        let worked = worked?;
        let other = other.map_err(|_| anyhow!("what ran beside it panicked"))??;
        Ok((other, worked))
    })
}
