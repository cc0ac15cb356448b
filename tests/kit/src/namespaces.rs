//! Tests that need namespaces of their own.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

/// Set for a test that [`run_inside`] runs.
const INSIDE: &str = "UBLKUP_TEST_INSIDE";

/// Whether [`run_inside`] runs this.
#[must_use]
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs one test of this program again, in new namespaces: those of `options` of unshare(1), and one of users if this
/// user is not root.
///
/// # Panics
///
/// When it fails, or there is no test of this name.
pub fn run_inside<I>(options: I, test: &str, stdin: impl Into<Stdio>)
where
    I: IntoIterator<Item: AsRef<OsStr>>,
{
    let mut command = Command::new("unshare");
    command.args(options);
    if !rustix::process::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    let program = std::env::current_exe().expect("the path of this program");
    command.arg(program).args(["--exact", test]);
    let output = command.env(INSIDE, "").stdin(stdin).output();
    let output = output.expect("unshare runs (package util-linux)");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
