//! Instructions of a process, one by one: for machines whose processor has no counter to be read, and for
//! counts that do not depend on time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::allocator;

/// How long a thread may need to come to rest.
const PATIENCE: Duration = Duration::from_secs(20);

/// Lets all threads of a process run instruction by instruction, until it is stopped or dropped.
///
/// System calls are one instruction; a string instruction is one for each of its repetitions.
#[derive(Debug)]
pub struct Stepper {
    /// Closing it ends the counting: who traces can wait for children only, and this is one's input.
    bell: Option<ChildStdin>,
    thread: Option<JoinHandle<Result<()>>>,
    counters: Arc<Counters>,
    counts_allocations: bool,
}

/// What has been counted so far; the thread that traces writes it.
#[derive(Debug, Default)]
struct Counters {
    instructions: AtomicU64,
    system_calls: AtomicU64,
    allocations: AtomicU64,
}

/// What the threads of a process have executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Instructions in user mode.
    pub instructions: u64,
    /// Those of them that call the kernel.
    pub system_calls: u64,
    /// Calls of the C library's allocator; `None` if it is not to be found in the process.
    pub allocations: Option<u64>,
}

/// What the instruction at an address does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    SystemCall,
    Allocation,
}

impl Stepper {
    /// Begins with a process. Threads that come later are counted too.
    pub fn start(pid: u32) -> Result<Self> {
        let counters = Arc::<Counters>::default();
        let allocator = allocator::entries(pid);
        let counts_allocations = !allocator.is_empty();
        let known = allocator.into_iter().map(|at| (at, Kind::Allocation));
        let mut code = Code(known.collect());
        let (told, begun) = std::sync::mpsc::channel();
        let counting = Arc::clone(&counters);
        // All that is traced is traced by one thread, which alone may wait for it.
        let thread = thread::Builder::new().name("steps".into()).spawn(move || {
            let mut bell = Command::new("cat")
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .spawn()
                .context("cannot run cat")?;
            let mut traced = Traced::all_of(pid)?;
            let _nobody_waits = told.send(bell.stdin.take());
            traced.count(bell, &mut code, &counting)
        })?;
        let mut stepper = Self {
            bell: None,
            thread: Some(thread),
            counters,
            counts_allocations,
        };
        if let Ok(bell) = begun.recv() {
            stepper.bell = bell;
            return Ok(stepper);
        }
        let why = stepper.end().err();
        Err(why.unwrap_or_else(|| anyhow!("there is nothing to count")))
    }

    /// What has been counted so far. It is exact while all threads of the process sleep.
    pub fn counts(&self) -> Steps {
        let read = |counter: &AtomicU64| counter.load(Ordering::Acquire);
        Steps {
            instructions: read(&self.counters.instructions),
            system_calls: read(&self.counters.system_calls),
            allocations: (self.counts_allocations).then(|| read(&self.counters.allocations)),
        }
    }

    /// Lets the process run freely again; what was counted.
    pub fn stop(mut self) -> Result<Steps> {
        self.end()?;
        Ok(self.counts())
    }

    fn end(&mut self) -> Result<()> {
        drop(self.bell.take());
        let thread = self.thread.take().context("it has been stopped")?;
        thread.join().map_err(|_| anyhow!("the tracer panicked"))?
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        if self.thread.is_some() {
            let _ended = self.end();
        }
    }
}

/// The threads that are traced by this one.
struct Traced(BTreeSet<Pid>);

impl Traced {
    fn all_of(pid: u32) -> Result<Self> {
        let folder = format!("/proc/{pid}/task");
        let mut traced = Self(BTreeSet::new());
        for task in fs::read_dir(&folder).with_context(|| format!("cannot read {folder}"))? {
            let id = task?.file_name().to_string_lossy().parse()?;
            let thread = Pid::from_raw(id);
            match ptrace::seize(thread, ptrace::Options::PTRACE_O_TRACECLONE) {
                // A thread of the kernel that works for the process: it has no instructions there.
                Err(Errno::EPERM) if id.cast_unsigned() != pid => continue,
                seized => seized.with_context(|| format!("cannot trace thread {id}"))?,
            }
            traced.0.insert(thread);
            ptrace::interrupt(thread)?;
        }
        Ok(traced)
    }

    /// Makes those stop who sleep in a system call.
    fn interrupt(&self) {
        for thread in &self.0 {
            // It may have ended.
            let _gone = ptrace::interrupt(*thread);
        }
    }

    /// Counts until a child of this thread, which is not traced, has ended.
    fn count(&mut self, mut bell: Child, code: &mut Code, counters: &Counters) -> Result<()> {
        let bell_id = Pid::from_raw(bell.id().cast_signed());
        let ours = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
        let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Release);
        let (mut asked, mut ending) = (Instant::now(), None::<Instant>);
        while !self.0.is_empty() {
            let flags = match ending {
                None => ours,
                Some(_) => ours | WaitPidFlag::WNOHANG,
            };
            let status = match waitpid(None, Some(flags)) {
                Ok(WaitStatus::StillAlive) => {
                    let late = ending.is_some_and(|since| since.elapsed() > PATIENCE);
                    ensure!(!late, "{} threads do not come to rest", self.0.len());
                    thread::sleep(Duration::from_millis(1));
                    // Not before a step that is under way had time to end.
                    if asked.elapsed() > Duration::from_secs(1) {
                        asked = Instant::now();
                        self.interrupt();
                    }
                    continue;
                }
                status => status.context("cannot wait for a step")?,
            };
            if status.pid() == Some(bell_id) {
                asked = Instant::now();
                ending = Some(asked);
                self.interrupt();
                continue;
            }
            let Some(thread) = status.pid() else {
                continue;
            };
            let signal = match status {
                WaitStatus::Exited(..) | WaitStatus::Signaled(..) => {
                    self.0.remove(&thread);
                    continue;
                }
                WaitStatus::Stopped(_, Signal::SIGTRAP) => {
                    add(&counters.instructions);
                    match code.next_of(thread) {
                        Kind::Plain => {}
                        Kind::SystemCall => drop(add(&counters.system_calls)),
                        Kind::Allocation => drop(add(&counters.allocations)),
                    }
                    None
                }
                WaitStatus::Stopped(_, signal) => Some(signal),
                // Begun, interrupted, or has made another thread.
                _ => None,
            };
            // One that has just been made is seen here for the first time.
            self.0.insert(thread);
            // Only after a step is none under way, whose signal would kill who is not traced any more.
            let stepped = matches!(status, WaitStatus::Stopped(_, Signal::SIGTRAP));
            let gone = match ending {
                Some(_) if stepped => {
                    self.0.remove(&thread);
                    ptrace::detach(thread, None)
                }
                _ => ptrace::step(thread, signal),
            };
            match gone {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).context("cannot go on with a thread"),
            }
        }
        if ending.is_none() {
            let _gone = bell.kill();
            bell.wait()?;
        }
        Ok(())
    }
}

/// What is known of the code of the process, by address.
struct Code(BTreeMap<u64, Kind>);

/// `syscall` (Intel's manual, volume 2B) as the two bytes at an address are read.
const SYSCALL: u16 = 0x050f;

impl Code {
    /// The instruction that a stopped thread executes next.
    fn next_of(&mut self, thread: Pid) -> Kind {
        let offset = std::mem::offset_of!(libc::user_regs_struct, rip);
        let offset = std::ptr::without_provenance_mut(offset);
        // It may have been killed meanwhile.
        let Ok(at) = ptrace::read_user(thread, offset) else {
            return Kind::Plain;
        };
        let at = at.cast_unsigned();
        *self.0.entry(at).or_insert_with(|| {
            let place = std::ptr::with_exposed_provenance_mut(usize::try_from(at).unwrap_or(0));
            match ptrace::read(thread, place) {
                Ok(word) if (word & 0xffff) == i64::from(SYSCALL) => Kind::SystemCall,
                _ => Kind::Plain,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Write as _};

    /// A shell's loop of so many rounds is traced from one line it reads to the next it writes.
    fn steps_of_a_loop(rounds: u32) -> u64 {
        let script = "while read -r n; do while [ $n -gt 0 ]; do n=$((n-1)); done; echo done; done";
        let mut shell = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("there is a shell");
        let mut input = shell.stdin.take().expect("a pipe");
        let mut output = BufReader::new(shell.stdout.take().expect("a pipe"));
        let mut line = String::new();
        // Until it has begun to read.
        writeln!(input, "0").expect("it reads");
        output.read_line(&mut line).expect("it writes");
        let stepper = Stepper::start(shell.id()).expect("a child may be traced");
        writeln!(input, "{rounds}").expect("it reads");
        line.clear();
        output.read_line(&mut line).expect("it writes");
        assert_eq!(line, "done\n");
        let steps = stepper.stop().expect("it comes to rest");
        // At least those that read and write the lines.
        assert!(steps.system_calls >= 2, "{steps:?}");
        // It runs on as if nothing had been.
        writeln!(input, "1").expect("it reads");
        line.clear();
        output.read_line(&mut line).expect("it writes");
        assert_eq!(line, "done\n");
        drop(input);
        assert!(shell.wait().expect("it ends").success());
        steps.instructions
    }

    #[test]
    fn twice_the_work_is_twice_the_instructions() {
        let [some, more] = [4, 8].map(steps_of_a_loop);
        assert!(some > 4 * 20, "only {some} instructions");
        let ratio = more as f64 / some as f64;
        assert!((1.3..2.1).contains(&ratio), "{some}, then {more}");
    }
}
