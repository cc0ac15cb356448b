//! Lists of processors, and where a thread may run.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Keeps the calling thread on these processors, or on those of them that this process may use.
///
/// # Errors
///
/// When there is none of them that it may use.
pub fn settle_on(cpus: &Cpus) -> io::Result<()> {
    let mut set = CpuSet::new();
    for cpu in cpus.0.iter() {
        set.set(usize::from(*cpu));
    }
    sched_setaffinity(None, &set).map_err(|error| {
        io::Error::other(format!(
            "a queue thread cannot run on processor {cpus}: {error}"
        ))
    })
}

/// Whether the calling thread may run on one processor only.
pub(crate) fn is_bound_to_one() -> bool {
    may_use() == Some(1)
}

/// Whether the calling thread may run on all processors that are there.
pub(crate) fn is_unbound() -> bool {
    may_use().is_some_and(|count| count >= processors_online())
}

/// How many processors there are, also those that this process may not use.
pub(crate) fn processors_online() -> usize {
    // SAFETY: asks for a number.
    let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    usize::try_from(count).unwrap_or(1)
}

/// How many processors that are there the calling thread may run on.
fn may_use() -> Option<usize> {
    // It fails where there are more processors than the mask has room for.
    usize::try_from(sched_getaffinity(None).ok()?.count()).ok()
}

/// Processors, in the order in which threads get them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus(Arc<[u16]>);

/// A list of one.
impl From<u16> for Cpus {
    fn from(cpu: u16) -> Self {
        Self([cpu].into())
    }
}

impl Cpus {
    /// The processor of the `number`th thread: when there are more threads, they begin again with
    /// the first.
    #[must_use]
    pub fn of(&self, number: u16) -> u16 {
        self.0[usize::from(number) % self.0.len()]
    }

    /// Checks that this process may run on each of them.
    ///
    /// # Errors
    ///
    /// When it may not, or one does not exist; the text says which there are.
    pub fn check_usable(&self) -> Result<(), String> {
        // It fails where there are more processors than the mask has room for; then threads find out.
        let Ok(usable) = sched_getaffinity(None) else {
            return Ok(());
        };
        match self.0.iter().find(|cpu| !usable.is_set(usize::from(**cpu))) {
            Some(cpu) => {
                let usable = (0..)
                    .take(MAX)
                    .filter(|cpu| usable.is_set(usize::from(*cpu)));
                Err(format!(
                    "processor {cpu} does not exist or is not allowed to this process: give some of {}",
                    Self(usable.collect())
                ))
            }
            None => Ok(()),
        }
    }

    /// The processors whose bits are set in a mask, the lowest first, as far as an affinity mask of
    /// ours has room for them. `None` when there are none.
    #[must_use]
    pub fn from_mask(words: &[u64]) -> Option<Self> {
        let bits = (0..MAX).filter(|bit| {
            let word = words.get(bit / 64).copied().unwrap_or(0);
            word >> (bit % 64) & 1 == 1
        });
        // No truncation: `MAX` fits.
        let cpus: Arc<[u16]> = bits.filter_map(|bit| u16::try_from(bit).ok()).collect();
        (!cpus.is_empty()).then_some(Self(cpus))
    }
}

/// Why a text is no list of processors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("give processors below {MAX}, like 0,2,4-7")]
pub struct BadCpus;

/// Processors that an affinity mask has room for.
const MAX: usize = CpuSet::MAX_CPU;

impl FromStr for Cpus {
    type Err = BadCpus;

    fn from_str(text: &str) -> Result<Self, BadCpus> {
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            match (first.parse::<u16>(), last.parse::<u16>()) {
                (Ok(first), Ok(last)) if first <= last && usize::from(last) < MAX => {
                    cpus.extend(first..=last);
                }
                _ => return Err(BadCpus),
            }
        }
        Ok(Self(cpus.into()))
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cpus: Vec<_> = self.0.iter().map(u16::to_string).collect();
        f.write_str(&cpus.join(","))
    }
}

serialize_as_text!(Cpus);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read_in_their_order() {
        let cpus: Cpus = "3,0-1,7".parse().unwrap();
        assert_eq!(cpus.to_string(), "3,0,1,7");
        let got: Vec<_> = (0..6).map(|number| cpus.of(number)).collect();
        assert_eq!(got, [3, 0, 1, 7, 3, 0]);
    }

    #[test]
    fn what_is_no_list_of_processors_is_refused() {
        for bad in ["", ",", "1,", "a", "3-1", "-1", "1-", "1024", "0-70000"] {
            assert_eq!(bad.parse::<Cpus>(), Err(BadCpus), "{bad}");
        }
    }

    #[test]
    fn processors_that_cannot_be_used_are_refused() {
        // SAFETY: asks where the thread is.
        let here = unsafe { libc::sched_getcpu() };
        let here: Cpus = here.to_string().parse().unwrap();
        assert_eq!(here.check_usable(), Ok(()));
        let error = Cpus::from(1023).check_usable().unwrap_err();
        assert!(error.contains("processor 1023"), "{error}");
    }

    #[test]
    fn a_mask_is_a_list_of_processors() {
        let cpus = |words: &[u64]| Cpus::from_mask(words).map(|cpus| cpus.to_string());
        assert_eq!(cpus(&[0b1011, 0, 1]), Some("0,1,3,128".into()));
        assert_eq!(cpus(&[1 << 63]), Some("63".into()));
        assert_eq!((cpus(&[]), cpus(&[0; 128])), (None, None));
        // Behind the last one that we could settle on.
        let mut far = [0; 128];
        far[MAX / 64] = 1;
        assert_eq!(cpus(&far), None);
    }
}
