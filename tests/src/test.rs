//! What a test is: a function, a line in a table, and what it is given.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tempfile::TempDir;
use testkit::server::Serve;
use testkit::shell::Shell;
use testkit::wait::until;

use crate::kernel::Kernel;
use crate::packages::guest_kernel::GuestKernel;

/// Tells servers, and commands to them, where their sockets are.
const RUNTIME_DIR: &str = "UBLKUP_RUNTIME_DIR";

/// Where a test body runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// In a process on this machine.
    Host,
    /// In a User Mode Linux guest.
    Uml,
    /// In an emulated x86 PC.
    Vm,
}

impl Place {
    /// How many times slower than the host to expect this place to be.
    /// Time limits are multiplied by it; nothing else may depend on it.
    pub fn slowness(self) -> u32 {
        match self {
            Place::Host => 1,
            Place::Uml => 2,
            Place::Vm => 4,
        }
    }
}

/// One test: a function and how to treat it.
#[derive(Clone, Copy)]
pub struct Test {
    /// The function's name, a sentence about what holds.
    pub name: &'static str,
    /// The body. `Ok` passes, an error or a panic fails, [`skip!`](crate::skip!) skips.
    pub body: fn(&Context) -> Result<()>,
    /// Seconds the body may take on the host; see [`Place::slowness`].
    pub limit_s: u32,
    /// Runs only with `--full`.
    pub full: bool,
}

impl Test {
    /// A test with the usual limit of 60 seconds. Prefer the macro [`test!`](crate::test!).
    pub const fn new(name: &'static str, body: fn(&Context) -> Result<()>) -> Self {
        Test {
            name,
            body,
            limit_s: 60,
            full: false,
        }
    }

    /// Gives the body this many seconds (on the host; slower places get more).
    pub const fn limit_s(mut self, limit_s: u32) -> Self {
        self.limit_s = limit_s;
        self
    }

    /// Marks a long soak, run only with `--full`.
    pub const fn full(mut self) -> Self {
        self.full = true;
        self
    }

    /// The time limit at a place.
    pub fn limit_at(&self, place: Place) -> Duration {
        Duration::from_secs(u64::from(self.limit_s) * u64::from(place.slowness()))
    }
}

impl fmt::Debug for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A line of a test table: `test!(module::function)` or `test!(name, |cx| …)`, optionally followed
/// by `.limit_s(…)` and `.full()`.
#[macro_export]
macro_rules! test {
    ($name:ident, $body:expr) => {
        $crate::test::Test::new(stringify!($name), $body)
    };
    ($($path:ident)::+) => {
        $crate::test::Test::new($crate::test::last_segment(stringify!($($path)::+)), $($path)::+)
    };
}

/// The part of a path after its last colon or space; used by [`test!`](crate::test!).
pub const fn last_segment(path: &'static str) -> &'static str {
    let bytes = path.as_bytes();
    let mut start = bytes.len();
    while start > 0 && bytes[start - 1] != b':' && bytes[start - 1] != b' ' {
        start -= 1;
    }
    path.split_at(start).1
}

/// Ends a test as skipped; the arguments say why, as for `format!`.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {
        return Err(::anyhow::Error::new($crate::test::Skip(format!($($why)*))))
    };
}

/// The "error" that marks a skipped test; see [`skip!`](crate::skip!).
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// The things on disk a test may need, with the same paths on the host and in
/// every guest (the guests' root file system is the host's).
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Paths {
    /// The checkout.
    pub repo: PathBuf,
    /// The server's binary, `ublkup`.
    pub server: PathBuf,
    /// The server without its test equipment, if it was built for this run.
    pub product: Option<PathBuf>,
    /// Cargo's test programs that need a guest, by target name, if they were built for this run.
    pub driver_tests: BTreeMap<String, PathBuf>,
    /// The images of the kernels that were built for this run.
    pub kernels: BTreeMap<Kernel, PathBuf>,
    /// Debian's kernel for guests, if it is to be used and can be had.
    pub guest_kernel: Option<GuestKernel>,
    /// The directory of the kernel's own test programs, if they were built for this run.
    pub selftests: Option<PathBuf>,
    /// fsx, if it was built for this run.
    pub fsx: Option<PathBuf>,
    /// Where herd7 is unpacked, if it was asked for and can be had.
    pub herd7: Option<PathBuf>,
    /// Where Ceph is unpacked, if it was asked for and can be had.
    pub ceph: Option<PathBuf>,
    /// The folder of the fuzz targets' programs, if they were built for this run.
    pub fuzzers: Option<PathBuf>,
}

impl Paths {
    /// The image of a kernel.
    pub fn kernel(&self, kernel: Kernel) -> Result<&Path> {
        let image = self.kernels.get(&kernel);
        image
            .map(PathBuf::as_path)
            .with_context(|| format!("this run has no {kernel} kernel"))
    }
}

/// What a test body is given.
#[derive(Debug)]
pub struct Context {
    /// Where the body runs.
    pub place: Place,
    /// The checkout, the server, the kernels.
    pub paths: Paths,
    scratch: PathBuf,
    exchange: PathBuf,
    args: Value,
    reply: Mutex<Value>,
}

impl Context {
    /// Puts a context together; the runner and the agent do this.
    pub fn new(
        place: Place,
        paths: Paths,
        scratch: PathBuf,
        exchange: PathBuf,
        args: Value,
    ) -> Self {
        Context {
            place,
            paths,
            scratch,
            exchange,
            args,
            reply: Mutex::new(Value::Null),
        }
    }

    /// A context on this machine beside any suite, and its directory.
    pub fn on_host(paths: Paths) -> Result<(TempDir, Self)> {
        let folder = tempfile::tempdir().context("cannot make a temporary directory")?;
        let [scratch, exchange] = ["scratch", "exchange"].map(|name| folder.path().join(name));
        for dir in [&scratch, &exchange] {
            fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let cx = Self::new(Place::Host, paths, scratch, exchange, Value::Null);
        Ok((folder, cx))
    }

    /// An empty directory of this test's own, removed afterwards: tmpfs in a
    /// guest, a temporary directory on the host.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// A directory that the guest and the process that booted it both read and write.
    /// On the host it is part of the run's directory.
    pub fn exchange(&self) -> &Path {
        &self.exchange
    }

    /// `seconds`, stretched by how slow this place is.
    pub fn patience(&self, seconds: u32) -> Duration {
        Duration::from_secs(u64::from(seconds) * u64::from(self.place.slowness()))
    }

    /// The servers' runtime directory.
    pub fn run_dir(&self) -> PathBuf {
        self.scratch.join("run")
    }

    /// A server with the tested binary in [`Context::run_dir`], no doors and no exports yet.
    pub fn serve(&self) -> Serve {
        Serve::new(&self.paths.server, self.patience(20)).env(RUNTIME_DIR, self.run_dir())
    }

    /// Another command of the tested binary, in the same runtime directory.
    pub fn ublkup(&self, args: &[&str]) -> Shell {
        Shell::new(&self.paths.server)
            .args(args)
            .env(RUNTIME_DIR, self.run_dir())
            .limit(self.patience(60))
    }

    /// What `stat` says about an export.
    pub fn stat(&self, export: &str) -> Result<Value> {
        let stat = self.ublkup(&["stat", export, "--json"]).run()?;
        serde_json::from_str(&stat).context("stat is no JSON")
    }

    /// Waits until the export `disk` is in this state of access.
    pub fn expect_access(&self, wanted: &str) -> Result<()> {
        until(
            &format!("the access is {wanted}"),
            self.patience(20),
            || Ok(self.stat("disk")?["access"] == wanted),
        )
    }

    /// An image of zeroes in the scratch directory; the one before, if there is one, is lost.
    pub fn image(&self, size_bytes: u64) -> Result<PathBuf> {
        let path = self.scratch.join("disk.img");
        File::create(&path)
            .and_then(|file| file.set_len(size_bytes))
            .with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// The storage of a new [`Context::image`], as servers are told.
    pub fn file(&self, size_bytes: u64) -> Result<String> {
        Ok(format!("file:{}", self.image(size_bytes)?.display()))
    }

    /// The arguments this step was started with (see [`crate::machine::Machine::run_step`]).
    pub fn args<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_value(self.args.clone())
            .with_context(|| format!("unexpected arguments: {}", self.args))
    }

    /// Returns a value to the test that started this step.
    pub fn reply<T: Serialize>(&self, value: &T) -> Result<()> {
        let value = serde_json::to_value(value).context("cannot encode a reply")?;
        *self
            .reply
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = value;
        Ok(())
    }

    /// What [`Context::reply`] was given, or null.
    pub fn take_reply(&self) -> Value {
        std::mem::take(
            &mut *self
                .reply
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_is_named_by_the_last_part_of_its_path() {
        assert_eq!(last_segment("plain"), "plain");
        assert_eq!(last_segment("doors::agree"), "agree");
        assert_eq!(last_segment("doors :: agree"), "agree");
    }

    #[test]
    fn limits_stretch_with_the_place() {
        let test = Test::new("t", |_| Ok(())).limit_s(10);
        assert_eq!(test.limit_at(Place::Host), Duration::from_secs(10));
        assert!(test.limit_at(Place::Vm) > test.limit_at(Place::Uml));
    }
}
