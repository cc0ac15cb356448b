//! The kernel's own test programs (`tools/testing/selftests`): those of the series, and the ones
//! that were there before for the parts that it touches.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::build::plain_make;
use crate::packages::unpacked::LIBURING;
use crate::progress;
use crate::suites::litmus;

/// One directory of test programs.
struct Collection {
    /// Below `tools/testing/selftests`, and below the build's own directory.
    dir: &'static str,
    /// What to build there. Not built: what needs a BPF toolchain or a newer liburing than the
    /// oldest supported Debian has.
    programs: &'static str,
    /// Scripts there that run them.
    scripts: &'static str,
    /// Settings for make.
    settings: &'static str,
}

/// Programs that need nothing special.
const fn collection(dir: &'static str, programs: &'static str) -> Collection {
    Collection {
        dir,
        programs,
        scripts: "",
        settings: "",
    }
}

const COLLECTIONS: [Collection; 9] = [
    collection(
        "net/af_unix",
        "unix_fd_addr unix_fd_addr_blk diag_anchor diag_uid msg_oob scm_inq scm_pidfd \
             scm_rights so_peek_off unix_connect unix_connreset unix_listen",
    ),
    collection(
        "landlock",
        "fd_addr_test base_test fs_test net_test ptrace_test \
             scoped_abstract_unix_test scoped_signal_test scoped_test tsync_test true \
             sandbox-and-launch wait-pipe wait-pipe-sandbox",
    ),
    Collection {
        // The Makefile links everything there with liburing, which this program does not use.
        settings: "LDLIBS=-lpthread",
        ..collection("ublk", "fd_addr")
    },
    collection(
        "ringbuffer",
        "args_test device_test hostile_test kinds_test mapping_test pending_test \
             pipe_test poll_test ring_bench rules_test stress_test",
    ),
    collection("pipe", "pipe_bench"),
    Collection {
        scripts: "default_file_splice_read.sh short_splice_read.sh",
        ..collection("splice", "default_file_splice_read splice_read")
    },
    collection("filesystems/epoll", "epoll_wakeup_test"),
    collection(
        "futex/functional",
        "futex_priv_hash futex_requeue futex_wait futex_wait_private_mapped_file \
             futex_wait_timeout futex_wait_wouldblock futex_waitv robust_list",
    ),
    collection(
        "mm",
        "madv_populate map_populate merge mlock2-tests mremap_test mseal_test",
    ),
];

/// Seconds that a test may take, in the harness as it is, and in ours: on an emulated machine with a
/// debug kernel, some take half a minute.
const HARNESS_LIMIT: (&str, &str) = (
    "#define TEST_TIMEOUT_DEFAULT 30\n",
    "#define TEST_TIMEOUT_DEFAULT 300\n",
);

/// Scripts that are not built but taken as they are, the directory and the beginning of their names.
const SCRIPTS: (&str, &str) = ("ublk", "test_");

/// Everything that decides what is built.
pub(super) fn ingredients() -> String {
    let mut all = String::from(HARNESS_LIMIT.1);
    all += SCRIPTS.0;
    all += SCRIPTS.1;
    for collection in &COLLECTIONS {
        all += collection.dir;
        let parts = [collection.programs, collection.scripts, collection.settings];
        for part in parts.into_iter().flat_map(str::split_whitespace) {
            all.push(' ');
            all += part;
        }
        all.push('\n');
    }
    all
}

/// The headers of a source tree, in the build's own directory.
struct Headers(PathBuf);

impl Headers {
    fn of(tree: &Path, into: &Path, log: &Path) -> Result<Self> {
        let headers = into.join("headers");
        let mut install = plain_make();
        install
            .arg("-C")
            .arg(tree)
            .arg(format!("O={}", headers.display()))
            .args(["ARCH=x86_64", "headers"]);
        fs::create_dir(&headers).context("cannot make a directory for headers")?;
        let limit = Duration::from_secs(600);
        progress::run("collecting the kernel's headers", install, log, limit)?;
        Ok(Self(headers))
    }

    fn include(&self) -> PathBuf {
        self.0.join("usr/include")
    }

    fn remove(self) -> Result<()> {
        fs::remove_dir_all(self.0).context("cannot remove the headers")
    }
}

/// Builds kublk, the kernel's own ublk server, of `tree` into `into`, with that tree's headers.
pub(super) fn build_kublk(tree: &Path, into: &Path, logs: &Path) -> Result<()> {
    let minute = Duration::from_secs(60);
    let liburing = LIBURING.dir()?;
    let headers = Headers::of(tree, into, &logs.join("kublk-headers.log"))?;
    let (include, newer) = (headers.include(), liburing.join("usr/include"));
    let archive = liburing.join("usr/lib/x86_64-linux-gnu/liburing.a");
    let mut make = plain_make();
    make.arg("-C")
        .arg(tree.join("tools/testing/selftests/ublk"))
        .arg(format!("OUTPUT={}", into.display()))
        // Into the program: the guest has the machine's own liburing.
        .arg(format!("LDLIBS=-lpthread -lm {}", archive.display()))
        .arg(into.join("kublk"))
        .env(
            "CPATH",
            format!("{}:{}", include.display(), newer.display()),
        )
        .env("LIBRARY_PATH", liburing.join("usr/lib/x86_64-linux-gnu"));
    progress::run("building kublk", make, &logs.join("kublk.log"), 10 * minute)?;
    headers.remove()
}

/// Builds them of `tree` into subdirectories of `into`, with the headers of that tree.
pub(super) fn build(tree: &Path, into: &Path, logs: &Path) -> Result<()> {
    let minute = Duration::from_secs(60);
    let headers = Headers::of(tree, into, &logs.join("selftests-headers.log"))?;
    let include = headers.include();
    let harness = tree.join("tools/testing/selftests/kselftest_harness.h");
    let text = fs::read_to_string(&harness).context("the kernel's tests have no harness")?;
    ensure!(
        text.contains(HARNESS_LIMIT.0),
        "{} has another time limit by now",
        harness.display()
    );
    fs::write(&harness, text.replace(HARNESS_LIMIT.0, HARNESS_LIMIT.1))
        .context("cannot write the harness")?;
    for collection in &COLLECTIONS {
        let output = into.join(collection.dir);
        let sources = tree.join("tools/testing/selftests").join(collection.dir);
        fs::create_dir_all(&output)
            .with_context(|| format!("cannot create {}", output.display()))?;
        let name = collection.dir.replace('/', "-");
        let mut make = plain_make();
        make.arg("-C")
            .arg(&sources)
            .arg(format!("OUTPUT={}", output.display()))
            .args(collection.settings.split_whitespace())
            .args(collection.programs.split(' ').map(|name| output.join(name)))
            // The Makefiles differ in where they expect the headers; this they all leave alone.
            .env("CPATH", &include);
        progress::run(
            &format!("building the kernel's tests of {}", collection.dir),
            make,
            &logs.join(format!("selftests-{name}.log")),
            20 * minute,
        )?;
        for script in collection.scripts.split_whitespace() {
            let from = sources.join(script);
            fs::copy(&from, output.join(script))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    let from = tree.join("tools/testing/selftests").join(SCRIPTS.0);
    take_scripts(&from, &into.join(SCRIPTS.0))?;
    litmus::collect(tree, &into.join(litmus::DIR))?;
    headers.remove()
}

fn take_scripts(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("cannot list {}", from.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(SCRIPTS.1) {
            fs::copy(entry.path(), to.join(&name))
                .with_context(|| format!("cannot copy {}", entry.path().display()))?;
        }
    }
    Ok(())
}
