//! The tables: which suites there are, and which tests are in them.
//!
//! To add a test, write a function `fn sentence_that_holds(cx: &Context) -> Result<()>`
//! in a module here and put `test!(module::sentence_that_holds)` into one of
//! the tables. To add a suite, add an entry to [`SUITES`].

mod agree;
mod bench;
mod block;
mod block_clients;
mod blockdev;
mod ceph;
mod compare;
mod debug;
mod docs;
mod fd_address;
mod formats;
mod fsx;
mod fuzzing;
mod guest;
mod hammer;
mod hand_over;
mod handshakes;
mod io;
mod kcsan;
mod kernel;
mod launcher;
mod libvirt;
pub mod litmus;
mod migration;
mod own_tests;
mod package;
mod probe;
mod qemu;
mod races;
mod restart;
pub mod ring;
mod ring_pipe;
mod ring_programs;
mod selftest;
pub mod series;
mod soak;
mod story;
mod survive;
mod ublk_selftests;
pub mod upgraded;
mod vhost;

use crate::kernel::Kernel::{self, Uml, UmlBase, UmlDebug, X86, X86Debug, X86Kcsan};
use crate::test::{Place, Test};
use Need::{DriverTests, Fsx, Fuzzers, Herd7, Selftests, Server, Tools};

/// A named table of tests and what it takes to run them.
#[derive(Debug)]
pub struct Suite {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line for `--list`.
    pub about: &'static str,
    /// Where the bodies run: on the first kernel of `needs`, if it is not the host.
    pub place: Place,
    /// What must be there before the first test.
    pub needs: &'static [Need],
    /// The tests.
    pub tests: &'static [&'static [Test]],
    /// Also runs `cargo test --workspace` and counts its tests.
    pub with_cargo_test: bool,
    /// Runs only with `--full`, or when it is named.
    pub full: bool,
}

impl Suite {
    /// The kernel that the bodies run on, or nothing for the host's own.
    pub fn machine(&self) -> Option<Kernel> {
        let first = self.needs.iter().find_map(|need| match need {
            Need::Kernel(kernel) => Some(*kernel),
            _ => None,
        });
        first.filter(|_| self.place != Place::Host)
    }
}

/// Something a suite needs that takes time to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A kernel of the lab.
    Kernel(Kernel),
    /// The kernel's own test programs.
    Selftests,
    /// The `ublkup` binary.
    Server,
    /// The `ublkup` binary without its test equipment, as it is used.
    Product,
    /// Cargo's test programs whose ignored tests need a ublk driver or root.
    DriverTests,
    /// QEMU, its storage daemon, fio, e2fsprogs, strace, libvirt's schemas.
    Tools,
    /// fsx, of crates.io.
    Fsx,
    /// herd7, if this system can have it.
    Herd7,
    /// Daemons and programs of Ceph, if this system can have them.
    Ceph,
    /// The fuzz targets.
    Fuzzers,
    /// What builds packages, and fresh systems to install them in.
    Packager,
}

/// What most suites have in common.
const SUITE: Suite = Suite {
    name: "",
    about: "",
    place: Place::Host,
    needs: &[],
    tests: &[],
    with_cargo_test: false,
    full: false,
};

/// Every suite, in the order they run.
pub const SUITES: &[Suite] = &[
    Suite {
        name: "host",
        about: "unit tests of every package, and tests that need no other kernel",
        place: Place::Host,
        needs: &[Server, Need::Product, Tools],
        tests: &[docs::TESTS, package::UNITS, handshakes::TESTS, bench::TESTS],
        with_cargo_test: true,
        ..SUITE
    },
    Suite {
        name: "lab",
        about: "the lab itself: what goes wrong in a machine is reported as a failure",
        place: Place::Host,
        needs: &[Need::Kernel(Uml), Need::Kernel(X86), Tools],
        tests: &[selftest::TESTS],
        ..SUITE
    },
    Suite {
        name: "uml",
        about: "inside a User Mode Linux kernel, one processor",
        place: Place::Uml,
        needs: &[
            Need::Kernel(Uml),
            Need::Kernel(X86),
            Selftests,
            Server,
            DriverTests,
            Tools,
            Fsx,
        ],
        tests: &[
            kernel::TESTS,
            series::TESTS,
            fd_address::TESTS,
            ring_pipe::TESTS,
            races::TESTS,
            block::DRIVER_TESTS,
            block::TESTS,
            agree::TESTS,
            qemu::NESTED,
            soak::BLOCK_TESTS,
            survive::BLOCK_TESTS,
            block_clients::TESTS,
            fsx::BLOCK_TESTS,
        ],
        ..SUITE
    },
    Suite {
        name: "ring",
        about: "the kernel's rings: its own tests in User Mode Linux, the memory model's litmus tests",
        place: Place::Uml,
        needs: &[Need::Kernel(Uml), Selftests, Herd7, Tools],
        tests: &[
            litmus::TESTS,
            ring::TESTS,
            ring_programs::TESTS,
            ring_programs::LONG_TESTS,
        ],
        ..SUITE
    },
    Suite {
        name: "qemu",
        about: "a server process on the host and guests that use its disk",
        place: Place::Host,
        needs: &[Need::Kernel(Uml), Need::Kernel(X86), Server, Tools, Fsx],
        tests: &[
            story::TESTS,
            upgraded::TESTS,
            vhost::TESTS,
            soak::VHOST_TESTS,
            fsx::VHOST_TESTS,
            qemu::TESTS,
            launcher::STOCK_KERNEL_TESTS,
        ],
        ..SUITE
    },
    Suite {
        name: "ublk-selftests",
        about: "the kernel's own ublk tests, with ublkup in the place of the kernel's test server",
        place: Place::Uml,
        needs: &[Need::Kernel(Uml), Selftests, Server, Tools],
        tests: &[ublk_selftests::TESTS],
        ..SUITE
    },
    Suite {
        name: "upgrade",
        about: "a disk goes from the block device to a stock QEMU and back, in User Mode Linux",
        place: Place::Uml,
        needs: &[Need::Kernel(Uml), Need::Kernel(X86), Server, Tools],
        tests: &[
            probe::TESTS,
            launcher::TESTS,
            restart::TESTS,
            hand_over::TESTS,
        ],
        ..SUITE
    },
    Suite {
        name: "survive",
        about: "servers that die under a guest of the vhost door, and guests that move, on the host",
        place: Place::Host,
        needs: &[Need::Kernel(X86), Server, Tools],
        tests: &[survive::VHOST_TESTS, migration::TESTS],
        ..SUITE
    },
    Suite {
        name: "libvirt",
        about: "a stock libvirtd in namespaces of its own, and its guests",
        place: Place::Host,
        needs: &[Need::Kernel(X86), Server, Tools],
        tests: &[libvirt::TESTS],
        ..SUITE
    },
    Suite {
        name: "ceph",
        about: "images of a Ceph cluster on this machine",
        place: Place::Host,
        needs: &[Need::Kernel(X86), Need::Ceph, Server, DriverTests, Tools],
        tests: &[ceph::TESTS],
        ..SUITE
    },
    Suite {
        name: "formats",
        about: "the block device of an image that qemu-storage-daemon reads",
        place: Place::Uml,
        needs: &[Need::Kernel(Uml), Server, Tools],
        tests: &[formats::TESTS],
        ..SUITE
    },
    Suite {
        name: "ceph-block",
        about: "the block device of an image of Ceph, with its cluster in User Mode Linux",
        place: Place::Uml,
        needs: &[Need::Kernel(Uml), Need::Ceph, Server, Tools],
        tests: &[ceph::BLOCK_TESTS],
        full: true,
        ..SUITE
    },
    Suite {
        name: "vm",
        about: "inside an emulated x86 PC with four processors",
        place: Place::Vm,
        needs: &[Need::Kernel(X86), Selftests, Server, DriverTests, Tools],
        tests: &[
            kernel::TESTS,
            kernel::SMP_TESTS,
            series::TESTS,
            ring::TESTS,
            ring_programs::TESTS,
            fd_address::TESTS,
            ring_pipe::TESTS,
            races::TESTS,
            block::DRIVER_TESTS,
            block::TESTS,
            block::SMP_TESTS,
            blockdev::TESTS,
            agree::TESTS,
        ],
        ..SUITE
    },
    Suite {
        name: "package",
        about: "packages are built, installed in fresh Debian systems, upgraded in use and removed",
        place: Place::Host,
        needs: &[Need::Packager, Need::Kernel(Uml), Tools],
        tests: &[package::TESTS],
        full: true,
        ..SUITE
    },
    Suite {
        name: "fuzz",
        about: "each fuzz target for a minute",
        place: Place::Host,
        needs: &[Fuzzers],
        tests: &[fuzzing::TESTS],
        full: true,
        ..SUITE
    },
    Suite {
        name: "compare",
        about: "the kernel's own tests with the series and without",
        place: Place::Host,
        needs: &[Need::Kernel(Uml), Need::Kernel(UmlBase), Selftests, Tools],
        tests: &[compare::TESTS],
        full: true,
        ..SUITE
    },
    Suite {
        name: "debug-uml",
        about: "the series under KASAN, lockdep, kmemleak and failslab, one processor",
        place: Place::Uml,
        needs: &[
            Need::Kernel(UmlDebug),
            Selftests,
            Server,
            DriverTests,
            Tools,
        ],
        tests: DEBUG_TESTS,
        full: true,
        ..SUITE
    },
    Suite {
        name: "debug-vm",
        about: "the series under KASAN, lockdep, kmemleak and failslab, four processors",
        place: Place::Vm,
        needs: &[
            Need::Kernel(X86Debug),
            Selftests,
            Server,
            DriverTests,
            Tools,
        ],
        tests: DEBUG_TESTS,
        full: true,
        ..SUITE
    },
    Suite {
        name: "kcsan",
        about: "the series on a kernel that looks for data races, four processors",
        place: Place::Vm,
        needs: &[Need::Kernel(X86Kcsan), Selftests, Server, Tools],
        tests: &[
            kcsan::FIRST,
            series::TESTS,
            races::TESTS,
            ring::TESTS,
            ring::LONG_TESTS,
            kcsan::LAST,
        ],
        full: true,
        ..SUITE
    },
];

/// What the debug kernels run.
const DEBUG_TESTS: &[&[Test]] = &[
    debug::FIRST,
    series::TESTS,
    ring::TESTS,
    ring::LONG_TESTS,
    fd_address::TESTS,
    races::LONG_TESTS,
    block::DRIVER_TESTS,
    debug::LAST,
];

/// Tables that `cargo lab test` never runs by itself: steps that tests run in
/// machines they boot, and tests that are meant to fail.
const HIDDEN: &[(&str, &[Test])] = &[
    (STEPS, compare::STEPS),
    (STEPS, fsx::STEPS),
    (STEPS, guest::STEPS),
    (STEPS, hammer::STEPS),
    (STEPS, hand_over::STEPS),
    (STEPS, ring::STEPS),
    (STEPS, series::STEPS),
    (STEPS, upgraded::STEPS),
    (STEPS, crate::bench::vm::STEPS),
    (STEPS, crate::bench::ring::STEPS),
    (STEPS, soak::STEPS),
    (selftest::FAILING, selftest::FAILING_TESTS),
];

/// The table of steps for [`crate::machine::Machine::run_step`].
pub const STEPS: &str = "steps";

/// Finds a test by table and name, hidden tables included.
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
