//! The lab tests itself: guests in which something goes wrong must be failures.
//!
//! Tests that are meant to fail are in a hidden table and run only in machines that the tests here
//! boot.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use testkit::wait::until;

use crate::kernel::Kernel;
use crate::machine::{Hypervisor, Machine, Qemu, Uml};
use crate::report::{Outcome, TestResult};
use crate::suites;
use crate::test;
use crate::test::{Context, Test};

/// The tests.
pub const TESTS: &[Test] = &[
    test!(in_uml_everything_that_goes_wrong_is_a_failure, |cx| {
        every_failure(cx, &Uml::new(cx.paths.kernel(Kernel::Uml)?), true)
    })
    .limit_s(300),
    test!(
        in_an_emulated_pc_everything_that_goes_wrong_is_a_failure,
        |cx| { every_failure(cx, &Qemu::new(cx.paths.kernel(Kernel::X86)?), false) }
    )
    .limit_s(400),
    test!(a_kernel_that_cannot_boot_is_an_error_with_its_console),
    test!(a_machine_without_heartbeat_is_given_up_long_before_the_tests_limit).limit_s(120),
    test!(a_machine_that_is_merely_slow_is_not_given_up).limit_s(120),
];

/// The name of the table of tests that are meant to fail.
pub const FAILING: &str = "failing";

/// The tests that are meant to fail, and some that are not, to compare.
pub const FAILING_TESTS: &[Test] = &[
    test!(healthy, |_| Ok(())),
    test!(fails_with_a_message),
    test!(panics, |_| panic!("the expected panic")),
    test!(exits_without_a_result, |_| std::process::exit(0)),
    test!(hangs).limit_s(1),
    test!(leaves_a_mount_behind),
    test!(crashes_the_kernel).limit_s(20),
    test!(kills_the_agent).limit_s(1),
    test!(hangs_for_long).limit_s(600),
    test!(keeps_every_processor_busy),
];

fn fails_with_a_message(_cx: &Context) -> Result<()> {
    println!("printed before");
    bail!("the expected message")
}

fn hangs(_cx: &Context) -> Result<()> {
    loop {
        std::thread::sleep(Duration::from_secs(1000));
    }
}

fn hangs_for_long(cx: &Context) -> Result<()> {
    std::fs::write(cx.exchange().join("begun"), "").context("cannot tell")?;
    hangs(cx)
}

/// Longer than [`a_machine_that_is_merely_slow_is_not_given_up`] lets the guest be silent.
fn keeps_every_processor_busy(_cx: &Context) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(15);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| while Instant::now() < end {});
        }
    });
    Ok(())
}

fn leaves_a_mount_behind(_cx: &Context) -> Result<()> {
    let dir = "/run/left-behind";
    std::fs::create_dir(dir).context("cannot make a directory")?;
    rustix::mount::mount(
        "none",
        dir,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    )
    .context("cannot mount")
}

fn crashes_the_kernel(_cx: &Context) -> Result<()> {
    std::fs::write("/proc/sysrq-trigger", "c").context("cannot ask for a crash")?;
    bail!("the kernel survived")
}

fn kills_the_agent(_cx: &Context) -> Result<()> {
    let agent = rustix::process::getppid().context("no agent")?;
    rustix::process::kill_process(agent, rustix::process::Signal::STOP).context("cannot stop it")
}

fn every_failure(cx: &Context, hypervisor: &dyn Hypervisor, silence: bool) -> Result<()> {
    let mut trial = Trial {
        cx,
        hypervisor,
        machine: None,
    };
    ensure!(trial.run("healthy")?.outcome == Outcome::Pass);
    trial.expect("fails_with_a_message", "the expected message", true)?;
    trial.expect("panics", "the expected panic", true)?;
    trial.expect("exits_without_a_result", "left no result", true)?;
    trial.expect("hangs", "did not end within", false)?;
    trial.expect("leaves_a_mount_behind", "/run/left-behind", false)?;
    trial.expect("crashes_the_kernel", "Kernel panic", false)?;
    if silence {
        // Slow by nature: the lab has to wait for the agent's answer in vain.
        let started = Instant::now();
        trial.expect("kills_the_agent", "fell silent", false)?;
        ensure!(
            started.elapsed() > Duration::from_secs(1),
            "the machine was given no time"
        );
    }
    // After all that, the next test gets a machine that works.
    ensure!(trial.run("healthy")?.outcome == Outcome::Pass);
    Ok(())
}

/// Runs such tests, each in the machine of the one before if that still works.
struct Trial<'a> {
    cx: &'a Context,
    hypervisor: &'a dyn Hypervisor,
    machine: Option<Machine>,
}

impl Trial<'_> {
    fn run(&mut self, name: &str) -> Result<TestResult> {
        let test = suites::find(FAILING, name).context("no such test")?;
        let machine = match &mut self.machine {
            Some(machine) if !machine.is_over() => machine,
            gone => {
                let log = format!("lab-{}-{name}", self.hypervisor.name());
                gone.insert(Machine::boot(self.hypervisor, &self.cx.paths, &log)?)
            }
        };
        let job = machine.job(FAILING, test);
        Ok(machine.run(&job))
    }

    fn expect(&mut self, name: &str, words: &str, survives: bool) -> Result<()> {
        let result = self.run(name)?;
        let Outcome::Fail { message } = &result.outcome else {
            bail!("{name} was reported as {:?}", result.outcome);
        };
        ensure!(
            message.contains(words),
            "{name} failed with another message: {message}"
        );
        let over = self.machine.as_ref().is_none_or(Machine::is_over);
        ensure!(
            over != survives,
            "after {name} the machine is {}",
            if over { "gone" } else { "still used" }
        );
        Ok(())
    }
}

fn a_machine_without_heartbeat_is_given_up_long_before_the_tests_limit(cx: &Context) -> Result<()> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    let mut machine = Machine::boot(&Uml::new(kernel), &cx.paths, "lab-no-heartbeat")?;
    machine.set_silence_limit(Duration::from_secs(5));
    let test = suites::find(FAILING, "hangs_for_long").context("no such test")?;
    let job = machine.job(FAILING, test);
    let group = machine.process();
    let begun = machine.exchange().join("begun");
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            // If it does not begin, the message below is another one.
            let _begun = until("it begins", cx.patience(60), || Ok(begun.exists()));
            rustix::process::kill_process_group(group, rustix::process::Signal::STOP)
        });
        machine.run(&job)
    });
    let Outcome::Fail { message } = &result.outcome else {
        bail!("a dead machine was reported as {:?}", result.outcome);
    };
    ensure!(
        begun.exists() && message.contains("no heartbeat") && message.contains("hangs_for_long"),
        "another message: {message}"
    );
    ensure!(machine.is_over(), "the dead machine is still used");
    Ok(())
}

fn a_machine_that_is_merely_slow_is_not_given_up(cx: &Context) -> Result<()> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    let mut machine = Machine::boot(&Uml::new(kernel), &cx.paths, "lab-slow")?;
    machine.set_silence_limit(Duration::from_secs(10));
    let test = suites::find(FAILING, "keeps_every_processor_busy").context("no such test")?;
    let job = machine.job(FAILING, test);
    let result = machine.run(&job);
    ensure!(result.outcome == Outcome::Pass, "{:?}", result.outcome);
    ensure!(!machine.is_over(), "the slow machine was given up");
    Ok(())
}

fn a_kernel_that_cannot_boot_is_an_error_with_its_console(cx: &Context) -> Result<()> {
    let kernel = cx.paths.kernel(Kernel::Uml)?;
    let broken = Uml::new(kernel).argument("init=/no/such/init");
    let error = match Machine::boot(&broken, &cx.paths, "lab-no-init") {
        Ok(_) => bail!("a kernel without init was taken for a machine"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(
        error.contains("Kernel panic") || error.contains("No working init"),
        "the message does not show the console: {error}"
    );
    Ok(())
}
