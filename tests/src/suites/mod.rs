//! The tables: which suites there are, and which tests are in them.
//!
//! To add a test, write a function `fn sentence_that_holds(cx: &Context) -> Result<()>`
//! in a module here and put `test!(module::sentence_that_holds)` into one of
//! the tables. To add a suite, add an entry to [`SUITES`].

mod agree;
mod block;
mod docs;
mod fd_address;
mod guest;
mod hand_over;
mod io;
mod kernel;
mod launcher;
mod probe;
mod qemu;
mod restart;
mod selftest;
mod story;
mod survive;
mod ublk_control;
pub mod upgraded;
mod vhost;

use crate::test::{Place, Test};

/// A named table of tests and what it takes to run them.
#[derive(Debug)]
pub struct Suite {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    /// Where the bodies run.
    pub place: Place,
    /// What must be there before the first test.
    pub needs: &'static [Need],
    /// The tests.
    pub tests: &'static [&'static [Test]],
    /// Also runs `cargo test --workspace` and counts its tests.
    pub with_cargo_test: bool,
}

/// Something a suite needs that takes time to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The User Mode Linux kernel.
    Uml,
    /// The x86-64 kernel.
    X86,
    /// The `ublkup` binary.
    Server,
    /// Cargo's test programs whose ignored tests need a ublk driver or root.
    DriverTests,
    /// QEMU, its storage daemon, fio, e2fsprogs, strace, libvirt's schemas.
    Tools,
}

/// Every suite, in the order they run.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "host",
        about: "unit tests of every package, and tests that need no other kernel",
        place: Place::Host,
        needs: &[Need::Server, Need::Tools],
        tests: &[docs::TESTS],
        with_cargo_test: true,
    },
    Suite {
        name: "lab",
        about: "the lab itself: what goes wrong in a machine is reported as a failure",
        place: Place::Host,
        needs: &[Need::Uml, Need::X86, Need::Tools],
        tests: &[selftest::TESTS],
        with_cargo_test: false,
    },
    Suite {
        name: "uml",
        about: "inside a User Mode Linux kernel, one processor",
        place: Place::Uml,
        needs: &[
            Need::Uml,
            Need::X86,
            Need::Server,
            Need::DriverTests,
            Need::Tools,
        ],
        tests: &[
            kernel::TESTS,
            fd_address::TESTS,
            block::TESTS,
            agree::TESTS,
            qemu::NESTED,
        ],
        with_cargo_test: false,
    },
    Suite {
        name: "qemu",
        about: "a server process on the host and guests that use its disk",
        place: Place::Host,
        needs: &[Need::Uml, Need::X86, Need::Server, Need::Tools],
        tests: &[
            story::TESTS,
            upgraded::TESTS,
            vhost::TESTS,
            qemu::TESTS,
            launcher::STOCK_KERNEL_TESTS,
        ],
        with_cargo_test: false,
    },
    Suite {
        name: "upgrade",
        about: "a disk goes from the block device to a stock QEMU and back, in User Mode Linux",
        place: Place::Uml,
        needs: &[Need::Uml, Need::X86, Need::Server, Need::Tools],
        tests: &[
            probe::TESTS,
            launcher::TESTS,
            restart::TESTS,
            hand_over::TESTS,
        ],
        with_cargo_test: false,
    },
    Suite {
        name: "survive",
        about: "servers that die under a guest of the vhost door, on the host",
        place: Place::Host,
        needs: &[Need::X86, Need::Server, Need::Tools],
        tests: &[survive::TESTS],
        with_cargo_test: false,
    },
    Suite {
        name: "vm",
        about: "inside an emulated x86 PC with four processors",
        place: Place::Vm,
        needs: &[Need::X86, Need::Server, Need::DriverTests, Need::Tools],
        tests: &[
            kernel::TESTS,
            kernel::SMP_TESTS,
            fd_address::TESTS,
            block::TESTS,
            block::SMP_TESTS,
            agree::TESTS,
        ],
        with_cargo_test: false,
    },
];

/// Tables that `cargo lab test` never runs by itself: steps that tests run in
/// machines they boot, and tests that are meant to fail.
const HIDDEN: &[(&str, &[Test])] = &[
    (STEPS, guest::STEPS),
    (STEPS, hand_over::STEPS),
    (STEPS, upgraded::STEPS),
    (selftest::PATIENTS, selftest::PATIENT_TESTS),
];

/// The table of steps for [`crate::machine::Machine::run_step`].
pub const STEPS: &str = "steps";

/// Finds a test by table and name, hidden tables included.
#[must_use]
pub fn find(suite: &str, name: &str) -> Option<&'static Test> {
    let shown = SUITES
        .iter()
        .filter(|known| known.name == suite)
        .flat_map(|known| known.tests.iter().copied());
    let hidden = HIDDEN
        .iter()
        .filter(|(known, _)| *known == suite)
        .map(|(_, tests)| *tests);
    shown.chain(hidden).flatten().find(|test| test.name == name)
}

/// The suite with this name.
#[must_use]
pub fn suite(name: &str) -> Option<&'static Suite> {
    SUITES.iter().find(|suite| suite.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_table_has_two_tests_of_one_name() {
        for suite in SUITES {
            let mut seen = BTreeSet::new();
            for test in suite.tests.iter().copied().flatten() {
                assert!(seen.insert(test.name), "{}: {}", suite.name, test.name);
            }
        }
        for (table, tests) in HIDDEN {
            let names: BTreeSet<_> = tests.iter().map(|test| test.name).collect();
            assert_eq!(names.len(), tests.len(), "{table}");
        }
    }

    #[test]
    fn every_registered_test_is_found_by_its_name() {
        for suite in SUITES {
            for test in suite.tests.iter().copied().flatten() {
                assert!(find(suite.name, test.name).is_some(), "{}", test.name);
            }
        }
        assert!(find("uml", "no_such_test").is_none());
    }
}
