//! `cargo lab test`: prepares what the chosen suites need, runs them, counts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;
use serde::Serialize;

use crate::cargo::{self, Build};
use crate::fuzz;
use crate::job::{self, Job};
use crate::kernel::build::{self, Product};
use crate::machine::{Hypervisor, Machine, Qemu, Uml};
use crate::packages::crates::FSX;
use crate::packages::unpacked::{CEPH, HERD7};
use crate::packages::{self, Purpose};
use crate::report::{Outcome, SuiteResult, TestResult, Totals, line};
use crate::suites::{self, Need, SUITES, Suite};
use crate::test::{Paths, Place, Test};

/// What was asked for.
#[derive(clap::Args, Debug, Default)]
pub struct Request {
    /// Suites to run; all of them if none is named (see --list)
    suites: Vec<String>,
    /// Also long soaks
    #[arg(long)]
    full: bool,
    /// Install what is missing without asking
    #[arg(long)]
    yes: bool,
    /// Only tests whose `suite: name` matches this regular expression
    #[arg(long, value_name = "RE")]
    filter: Option<Regex>,
    /// Print what would run
    #[arg(long)]
    list: bool,
    /// Do not run suites in guests beside suites on this machine
    #[arg(long)]
    one_at_a_time: bool,
    /// Write all results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A suite and those of its tests that are to run.
struct Chosen {
    suite: &'static Suite,
    tests: Vec<&'static Test>,
    cargo_test: bool,
}

/// A machine that does not boot is tried this many times in a row.
const BOOT_ATTEMPTS: u32 = 2;

/// Prints the tests that would run.
fn list(chosen: &[Chosen]) {
    for chosen in chosen {
        let full = if chosen.suite.full { " (--full)" } else { "" };
        line(&format!(
            "{} - {}{full}",
            chosen.suite.name, chosen.suite.about
        ));
        if chosen.cargo_test {
            line("    cargo test --workspace");
        }
        for test in &chosen.tests {
            let full = if test.full { " (--full)" } else { "" };
            line(&format!("    {}{full}", test.name));
        }
    }
}

/// Runs suites, or lists them; the exit code says whether everything passed.
pub fn run(repo: &Path, request: &Request) -> Result<ExitCode> {
    let chosen = choose(request)?;
    if request.list {
        list(&chosen);
        return Ok(ExitCode::SUCCESS);
    }
    let started = Instant::now();
    let needs: Vec<Need> = chosen
        .iter()
        .flat_map(|one| one.suite.needs)
        .copied()
        .collect();
    let paths = prepare(repo, &needs, Build::Testing, request.yes)?;
    let results = run_suites(&chosen, &paths, request.one_at_a_time)?;
    let mut totals = Totals::default();
    for result in &results {
        totals.add(result.totals());
    }
    if let Some(file) = &request.json {
        write_json(file, &results, totals)?;
    }
    for result in &results {
        for test in &result.tests {
            if matches!(test.outcome, Outcome::Fail { .. }) {
                line(&format!("failed: {}: {}", result.suite, test.name));
            }
        }
    }
    eprintln!("lab: all of it took {} s", started.elapsed().as_secs());
    line(&totals.to_string());
    Ok(if totals.failed == 0 && totals.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn choose(request: &Request) -> Result<Vec<Chosen>> {
    let mut wanted: Vec<&'static Suite> = Vec::new();
    if request.suites.is_empty() {
        wanted.extend(SUITES.iter().filter(|suite| request.full || !suite.full));
    }
    for name in &request.suites {
        let suite = suites::suite(name).with_context(|| {
            let names: Vec<&str> = SUITES.iter().map(|suite| suite.name).collect();
            format!("there is no suite {name}; there are: {}", names.join(", "))
        })?;
        wanted.push(suite);
    }
    let chosen: Vec<Chosen> = wanted
        .into_iter()
        .map(|suite| Chosen {
            suite,
            tests: suite
                .tests
                .iter()
                .copied()
                .flatten()
                .filter(|test| request.full || !test.full)
                .filter(|test| matches(request, suite, test.name))
                .collect(),
            cargo_test: suite.with_cargo_test && matches(request, suite, "cargo test"),
        })
        // A filter may leave nothing of a suite, which is then not run; a suite
        // that was empty to begin with fails.
        .filter(|one| request.filter.is_none() || one.cargo_test || !one.tests.is_empty())
        .collect();
    ensure!(!chosen.is_empty(), "no test matches the filter");
    Ok(chosen)
}

fn matches(request: &Request, suite: &Suite, name: &str) -> bool {
    request
        .filter
        .as_ref()
        .is_none_or(|filter| filter.is_match(&format!("{}: {name}", suite.name)))
}

/// Installs, builds and finds what is needed; `server` is the build of the server, if one is needed.
pub fn prepare(repo: &Path, wanted: &[Need], server: Build, yes: bool) -> Result<Paths> {
    let needs = |need: Need| wanted.contains(&need);
    let mut purposes = Vec::new();
    if needs(Need::Tools) {
        purposes.push(Purpose::Tests);
    }
    if [Need::Server, Need::Product, Need::DriverTests]
        .into_iter()
        .any(needs)
    {
        purposes.push(Purpose::ServerBuild);
    }
    if needs(Need::Fuzzers) {
        purposes.extend([Purpose::ServerBuild, Purpose::Fuzz]);
    }
    if needs(Need::Packager) {
        purposes.extend([Purpose::ServerBuild, Purpose::Package]);
    }
    packages::ensure(&purposes, yes)?;

    let mut paths = Paths {
        repo: repo.to_owned(),
        server: cargo::server_binary(server)?,
        ..Paths::default()
    };
    if needs(Need::Server) {
        cargo::build_server(repo, server)?;
    }
    if needs(Need::Product) {
        paths.product = Some(cargo::build_server(repo, Build::Product)?);
    }
    if needs(Need::DriverTests) {
        paths.driver_tests = cargo::build_driver_tests(repo)?;
    }
    if needs(Need::Fuzzers) {
        paths.fuzzers = Some(fuzz::build(repo)?);
    }
    if needs(Need::Fsx) {
        paths.fsx = Some(FSX.program()?);
    }
    if needs(Need::Herd7) {
        match HERD7.dir() {
            Ok(home) => paths.herd7 = Some(home),
            // Its tests say that they are skipped.
            Err(error) => eprintln!("lab: {error:#}"),
        }
    }
    if needs(Need::Ceph) {
        match CEPH.dir() {
            Ok(home) => paths.ceph = Some(home),
            // As above.
            Err(error) => eprintln!("lab: {error:#}"),
        }
    }
    let mut products: Vec<Product> = Vec::new();
    for need in wanted {
        let product = match need {
            Need::Kernel(kernel) => Product::Kernel(*kernel),
            Need::Selftests => Product::Selftests,
            Need::Server
            | Need::Product
            | Need::DriverTests
            | Need::Tools
            | Need::Fsx
            | Need::Herd7
            | Need::Ceph
            | Need::Fuzzers
            | Need::Packager => continue,
        };
        if !products.contains(&product) {
            products.push(product);
        }
    }
    if !products.is_empty() {
        let made = build::ensure(repo, &products, yes)?;
        for (product, path) in products.into_iter().zip(made) {
            match product {
                Product::Kernel(kernel) => {
                    paths.kernels.insert(kernel, path);
                }
                Product::Selftests => paths.selftests = Some(path),
                // No suite needs it.
                Product::Kublk => {}
            }
        }
    }
    Ok(paths)
}

/// Runs suites: those in guests beside those on this machine, each in their order. An error of one is its failure.
fn run_suites(chosen: &[Chosen], paths: &Paths, one_at_a_time: bool) -> Result<Vec<SuiteResult>> {
    let run = |one: &Chosen| {
        let name = one.suite.name;
        let result = run_suite(one, paths).unwrap_or_else(|error| {
            let mut result = SuiteResult::new(name);
            result.push(TestResult::not_run("(all)", format!("{error:#}")));
            result
        });
        line(&format!("{name}: {}", result.totals()));
        result
    };
    if one_at_a_time {
        return Ok(chosen.iter().map(run).collect());
    }
    // What is packaged is compiled in the place of what guests run.
    let is_alone = |one: &&Chosen| one.suite.needs.contains(&Need::Packager);
    let (alone, others): (Vec<_>, Vec<_>) = chosen.iter().partition(is_alone);
    let (guests, host): (Vec<_>, Vec<_>) =
        (others.into_iter()).partition(|one| one.suite.machine().is_some());
    let run_all = |these: Vec<&Chosen>| these.into_iter().map(run).collect::<Vec<_>>();
    thread::scope(|scope| {
        let guests = scope.spawn(|| run_all(guests));
        let mut results = run_all(host);
        let guests = guests.join();
        results.extend(guests.map_err(|_| anyhow!("the thread of the guests panicked"))?);
        results.extend(run_all(alone));
        Ok(results)
    })
}

fn run_suite(chosen: &Chosen, paths: &Paths) -> Result<SuiteResult> {
    let name = chosen.suite.name;
    let mut result = SuiteResult::new(name);
    if chosen.cargo_test {
        let (counted, verdict) = cargo::test_workspace(&paths.repo)?;
        result.counted = counted;
        result.tests.extend(verdict);
        result.push(cargo::check_product(&paths.repo)?);
    }
    match chosen.suite.machine() {
        None => run_on_host(chosen, paths, &mut result)?,
        Some(kernel) if kernel.is_uml() => {
            let machine = Uml::new(paths.kernel(kernel)?);
            run_in_machines(chosen, paths, &machine, &mut result);
        }
        Some(kernel) => {
            let machine = Qemu::new(paths.kernel(kernel)?).processors(4);
            run_in_machines(chosen, paths, &machine, &mut result);
        }
    }
    complete(chosen, &mut result);
    Ok(result)
}

/// A suite that ran nothing, or less than it was asked for, has failed.
fn complete(chosen: &Chosen, result: &mut SuiteResult) {
    let missing: Vec<&str> = chosen
        .tests
        .iter()
        .map(|test| test.name)
        .filter(|name| !result.tests.iter().any(|done| done.name == *name))
        .collect();
    for name in missing {
        let why = "it was asked for, but there is no result";
        result.push(TestResult::not_run(name, why));
    }
    if result.totals().all() == 0 {
        result.push(TestResult::not_run("(any)", "the suite ran no test"));
    }
}

fn run_on_host(chosen: &Chosen, paths: &Paths, result: &mut SuiteResult) -> Result<()> {
    let exchange = tempfile::tempdir().context("cannot make an exchange directory")?;
    for test in &chosen.tests {
        let job = Job::new(chosen.suite.name, test, Place::Host, paths, exchange.path());
        result.push(job::run(&job));
    }
    Ok(())
}

/// One machine for all tests, and a new one after each crash.
fn run_in_machines(
    chosen: &Chosen,
    paths: &Paths,
    hypervisor: &dyn Hypervisor,
    result: &mut SuiteResult,
) {
    let name = chosen.suite.name;
    let mut machine: Option<Machine> = None;
    let mut boots = 0;
    let mut failed_boots = 0;
    for test in &chosen.tests {
        if machine.as_ref().is_none_or(Machine::is_over) && failed_boots < BOOT_ATTEMPTS {
            boots += 1;
            match Machine::boot(hypervisor, paths, &format!("{name}-{boots}")) {
                Ok(fresh) => {
                    failed_boots = 0;
                    eprintln!(
                        "lab: {name}: Linux {}, console in {}",
                        fresh.kernel(),
                        fresh.console_log().display()
                    );
                    machine = Some(fresh);
                }
                Err(error) => {
                    failed_boots += 1;
                    machine = None;
                    result.push(TestResult::not_run(test.name, format!("{error:#}")));
                    continue;
                }
            }
        }
        match machine.as_mut().filter(|machine| !machine.is_over()) {
            Some(machine) => {
                let job = machine.job(name, test);
                result.push(machine.run(&job));
            }
            None => result.push(TestResult::not_run(test.name, "its machine does not boot")),
        }
    }
    if let Some(machine) = machine {
        machine.power_off();
    }
}

fn write_json(file: &Path, results: &[SuiteResult], totals: Totals) -> Result<()> {
    #[derive(Serialize)]
    struct All<'a> {
        suites: &'a [SuiteResult],
        totals: Totals,
    }
    let text = serde_json::to_vec_pretty(&All {
        suites: results,
        totals,
    })
    .context("cannot encode the results")?;
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// The checkout this binary was built from.
pub fn repo() -> Result<PathBuf> {
    let built_in = Path::new(env!("CARGO_MANIFEST_DIR"));
    let repo = built_in.parent().unwrap_or(built_in);
    if !repo.join("kernel-patch").is_dir() {
        bail!(
            "the checkout {} is gone; run `cargo lab` in a checkout",
            repo.display()
        );
    }
    Ok(repo.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &[Test] = &[Test::new("one", |_| Ok(()))];

    /// Completes a suite with these tests, none of which has run.
    fn completed(tests: &'static [Test]) -> SuiteResult {
        let chosen = Chosen {
            suite: &SUITES[0],
            tests: tests.iter().collect(),
            cargo_test: false,
        };
        let mut result = SuiteResult::new("x");
        complete(&chosen, &mut result);
        result
    }

    #[test]
    fn a_suite_that_ran_no_test_has_failed() {
        assert_eq!(completed(&[]).totals().failed, 1);
    }

    #[test]
    fn a_test_without_a_result_has_failed() {
        let result = completed(ONE);
        assert_eq!(result.totals().failed, 1);
        assert_eq!(result.tests[0].name, "one");
    }

    #[test]
    fn a_filter_that_matches_nothing_is_an_error() {
        let request = Request {
            filter: Some(Regex::new("^no such thing$").expect("a pattern")),
            ..Request::default()
        };
        assert!(choose(&request).is_err());
        let request = Request {
            suites: vec!["no-such-suite".into()],
            ..Request::default()
        };
        assert!(choose(&request).is_err());
    }

    #[test]
    fn every_suite_is_chosen_when_none_is_named() {
        let everything = Request {
            full: true,
            ..Request::default()
        };
        let chosen = choose(&everything).expect("all of them");
        assert_eq!(chosen.len(), SUITES.len());
        let usual = choose(&Request::default()).expect("most of them");
        assert!(usual.len() < chosen.len());
        assert!(usual.iter().all(|one| !one.suite.full));
    }
}
