//! How queue threads run: where, and what they do when they have nothing to do.

use std::io;
use std::sync::Arc;

use super::cpus::{Cpus, settle_on};
use super::polling::SharedPolling;

/// What all queue threads of an export have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadOptions {
    /// What they do when they have nothing to do.
    pub polling: Arc<SharedPolling>,
    /// Where they run; anywhere when there is none.
    pub cpus: Option<Cpus>,
}

impl ThreadOptions {
    /// Puts the calling thread, the `number`th of its door, where it belongs.
    ///
    /// # Errors
    ///
    /// When the processor does not exist or this process may not use it.
    pub fn settle(&self, number: u16) -> io::Result<()> {
        let Some(cpus) = &self.cpus else {
            return Ok(());
        };
        settle_on(&Cpus::from(cpus.of(number)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpus::{is_bound_to_one, is_unbound, processors_online};

    #[test]
    fn a_thread_settles_on_its_processor_or_says_why_not() {
        let on = |cpus: &str| ThreadOptions {
            cpus: Some(cpus.parse().unwrap()),
            ..ThreadOptions::default()
        };
        // SAFETY: asks where the thread is.
        let here = unsafe { libc::sched_getcpu() };
        let settled = std::thread::spawn(move || {
            on(&here.to_string()).settle(0).unwrap();
            (is_bound_to_one(), is_unbound())
        });
        let alone = processors_online() == 1;
        assert_eq!(settled.join().unwrap(), (true, alone));
        let error = on("1023").settle(0).unwrap_err().to_string();
        assert!(error.contains("processor 1023"), "{error}");
    }
}
