//! `cargo lab bench`: measures against others in the same run, and writes down everything.

pub mod attach;
pub mod client;
pub mod compare;
pub mod exports;
pub mod figures;
pub mod goals;
pub mod guard;
pub mod machine;
pub mod mixed;
pub mod native;
pub mod record;
pub mod ring;
pub mod storage;
pub mod table;
pub mod upgrade;
pub mod usage;
pub mod vm;

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use regex::Regex;

use self::client::End;
use self::record::{Document, FORMAT};
use crate::cargo::{self, Build};
use crate::kernel::Kernel;
use crate::packages::{self, Purpose};
use crate::report::line;
use crate::runner;
use crate::suites::Need;
use crate::test::Paths;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Lane {
    /// The vhost door against qemu-storage-daemon, as two host processes
    Native,
    /// The ublk door against kublk, rublk and the loop driver, in an emulated PC
    Vm,
    /// A guest before and after the upgrade, in User Mode Linux
    Upgrade,
    /// Many exports in one process, idle and busy
    Exports,
    /// An image of Ceph and a disk of a vhost-user server, against qemu-storage-daemon and fio
    Storage,
    /// Records through a pipe and through rings in its place, on three kernels
    Ring,
    /// How long requests take under reads, writes and flushes, at both doors
    Mixed,
    /// Costs of a request, counted and compared with the last landed tree; alone, and only if it is named
    Guard,
}

/// The command line.
#[derive(Args, Clone, Debug)]
pub struct Arguments {
    /// What to measure; everything if nothing is named
    pub lanes: Vec<Lane>,
    /// Interleaved rounds, a new connection in each [default: 5]
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Length of one measurement [default: 1]
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<f64>,
    /// Few loads, two rounds, a fifth of a second: shows that it works, measures nothing
    #[arg(long)]
    pub quick: bool,
    /// Only loads whose `lane: title: load` matches this regular expression
    #[arg(long, value_name = "RE")]
    pub only: Option<Regex>,
    /// Do not count system calls, which takes runs of its own
    #[arg(long)]
    pub no_counts: bool,
    /// Ours alone
    #[arg(long)]
    pub no_peers: bool,
    /// The processor of the servers
    #[arg(long, value_name = "CPU", default_value_t = 1)]
    pub server_cpu: usize,
    /// The processor of the clients
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    pub client_cpu: usize,
    /// Measure this program instead of building one
    #[arg(long, value_name = "FILE")]
    pub server: Option<PathBuf>,
    /// Compare the servers of two revisions, or of one and of this checkout, with each other
    #[arg(long, value_name = "REV", num_args = 1..=2, conflicts_with = "server")]
    pub compare: Vec<String>,
    /// guard: make the costs of this tree those that others are compared with (tests/guard.toml)
    #[arg(long)]
    pub update: bool,
    /// Where results go [default: bench in the target directory]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Put the tables into docs/benchmark-results.md too
    #[arg(long)]
    pub write_docs: bool,
    /// Measure nothing: show, as one, the results of earlier runs (their bench.json)
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["lanes", "server", "compare"])]
    pub from: Vec<PathBuf>,
    /// Print the JSON instead of the tables
    #[arg(long)]
    pub json: bool,
    /// Install what is missing without asking
    #[arg(long)]
    pub yes: bool,
}

/// What the lanes have to know, besides the command line.
#[derive(Debug)]
pub struct Settings {
    arguments: Arguments,
    /// The checkout.
    pub repo: PathBuf,
    /// Names (a prefix in tables) and programs of our servers.
    pub servers: Vec<(String, PathBuf)>,
    /// Interleaved rounds.
    pub rounds: usize,
    /// Length of one measurement in milliseconds.
    pub window_ms: u64,
    /// For disks.
    pub work: PathBuf,
    /// For sockets, whose names must be short.
    pub scratch: tempfile::TempDir,
}

impl Deref for Settings {
    type Target = Arguments;

    fn deref(&self) -> &Arguments {
        &self.arguments
    }
}

impl Settings {
    /// One run in which something is counted.
    pub fn short_window(&self) -> End {
        End::Milliseconds(self.window_ms.min(500))
    }

    /// The server of the lanes that measure one only.
    pub fn server(&self) -> Result<&Path> {
        let [(_, server)] = &self.servers[..] else {
            bail!("--compare is for the lanes native and mixed");
        };
        Ok(server)
    }

    /// Measures so many candidates in each round; the results of each. Every other round goes
    /// backwards, so that none always follows the same neighbour. What cannot be measured (`None`) is
    /// not tried again.
    pub fn interleaved<T>(
        &self,
        candidates: usize,
        mut measure: impl FnMut(usize) -> Result<Option<T>>,
    ) -> Result<Vec<Vec<T>>> {
        let mut found: Vec<Vec<T>> = (0..candidates).map(|_| Vec::new()).collect();
        for round in 0..self.rounds {
            for place in 0..candidates {
                let index = match round % 2 {
                    0 => place,
                    _ => candidates - 1 - place,
                };
                if found[index].len() == round {
                    found[index].extend(measure(index)?);
                }
            }
        }
        Ok(found)
    }

    /// Prepares a lane that measures in machines; `server` says whether it needs ours.
    pub fn prepare(&self, kernels: &[Kernel], server: bool) -> Result<Paths> {
        let kernels = kernels.iter().map(|kernel| Need::Kernel(*kernel));
        let needs: Vec<Need> = [Need::Tools].into_iter().chain(kernels).collect();
        let mut paths = runner::prepare(&self.repo, &needs, Build::Product, self.yes)?;
        if server {
            paths.server = self.server()?.to_owned();
        }
        Ok(paths)
    }

    /// Whether a load was asked for.
    pub fn wants(&self, lane: &str, title: &str, load: &str) -> bool {
        let name = format!("{lane}: {title}: {load}");
        self.only.as_ref().is_none_or(|only| only.is_match(&name))
    }
}

/// Measures and writes everything down.
pub fn run(repo: &Path, arguments: &Arguments) -> Result<ExitCode> {
    if arguments.lanes.contains(&Lane::Guard) {
        return guard::run(repo, arguments);
    }
    ensure!(!arguments.update, "--update is for the lane guard");
    let output = match &arguments.output {
        Some(output) => output.clone(),
        None => cargo::target_dir()?.join("bench"),
    };
    let document = if arguments.from.is_empty() {
        measure(repo, arguments, &output)?
    } else {
        earlier(&arguments.from)?
    };
    write(&document, &output)?;
    if arguments.write_docs {
        write_docs(&document, &repo.join("docs/benchmark-results.md"))?;
    }
    if arguments.json {
        line(&serde_json::to_string_pretty(&document).context("cannot encode the results")?);
    } else {
        line(&table::markdown(&document));
    }
    eprintln!("lab: results are in {}", output.display());
    Ok(ExitCode::SUCCESS)
}

/// The results of earlier runs in one document.
fn earlier(files: &[PathBuf]) -> Result<Document> {
    let mut all = files.iter().map(|file| {
        let text =
            fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        serde_json::from_str::<Document>(&text)
            .with_context(|| format!("{} is no bench.json of this version", file.display()))
    });
    let mut whole = all.next().context("no results were named")??;
    for next in all {
        whole.append(next?)?;
    }
    whole.goals = goals::of(&whole);
    Ok(whole)
}

fn measure(repo: &Path, arguments: &Arguments, output: &Path) -> Result<Document> {
    let clock = Instant::now();
    let started = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .context("the clock is before 1970")?;
    let mut purposes = vec![Purpose::Tests];
    if !arguments.no_counts || chosen(arguments).contains(&Lane::Storage) {
        purposes.push(Purpose::Bench);
    }
    packages::ensure(&purposes, arguments.yes)?;
    let settings = settings(repo, arguments, output)?;
    let mut document = Document {
        format: FORMAT,
        machine: machine::Facts::here(),
        revision: machine::revision(repo),
        command: std::iter::once("cargo lab".to_owned())
            .chain(std::env::args().skip(1))
            .collect::<Vec<_>>()
            .join(" "),
        started: started.as_secs(),
        ..Document::default()
    };
    for lane in chosen(arguments) {
        match lane {
            Lane::Native => native::run(&settings, &mut document)?,
            Lane::Vm => vm::run(&settings, &mut document)?,
            Lane::Upgrade => upgrade::run(&settings, &mut document)?,
            Lane::Exports => exports::run(&settings, &mut document)?,
            Lane::Storage => storage::run(&settings, &mut document)?,
            Lane::Ring => ring::run(&settings, &mut document)?,
            Lane::Mixed => mixed::run(&settings, &mut document)?,
            Lane::Guard => bail!("guard has no document"),
        }
    }
    if let [(first, _), (second, _)] = &settings.servers[..] {
        document.ratios = compare::ratios(&document.rows, first, second);
    }
    if document.rows.is_empty() && document.measures.is_empty() {
        bail!("nothing was measured: no load matches");
    }
    document.goals = goals::of(&document);
    document.seconds = clock.elapsed().as_secs();
    Ok(document)
}

fn chosen(arguments: &Arguments) -> Vec<Lane> {
    if !arguments.compare.is_empty() && arguments.lanes.is_empty() {
        vec![Lane::Native]
    } else if arguments.lanes.is_empty() {
        let all = Lane::value_variants().iter().copied();
        all.filter(|lane| *lane != Lane::Guard).collect()
    } else {
        arguments.lanes.clone()
    }
}

fn settings(repo: &Path, arguments: &Arguments, output: &Path) -> Result<Settings> {
    let servers = match chosen(arguments)[..] {
        [Lane::Ring] => Vec::new(),
        _ => servers(repo, arguments)?,
    };
    let seconds = arguments
        .seconds
        .unwrap_or(if arguments.quick { 0.2 } else { 1.0 });
    ensure!(
        (0.01..=3600.0).contains(&seconds),
        "--seconds {seconds}: choose between 0.01 and 3600"
    );
    let rounds = arguments
        .rounds
        .unwrap_or(if arguments.quick { 2 } else { 5 });
    ensure!(rounds > 0, "--rounds 0 measures nothing");
    let work = output.join("work");
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    Ok(Settings {
        arguments: arguments.clone(),
        repo: repo.to_owned(),
        servers,
        rounds,
        #[allow(clippy::cast_possible_truncation, reason = "it is below 3.6 million")]
        window_ms: (seconds * 1e3) as u64,
        work: work
            .canonicalize()
            .with_context(|| format!("cannot use {}", work.display()))?,
        scratch: tempfile::tempdir().context("cannot make a temporary directory")?,
    })
}

/// Our servers by their names in tables: the one of this checkout, or those that are compared.
fn servers(repo: &Path, arguments: &Arguments) -> Result<Vec<(String, PathBuf)>> {
    let mut all = Vec::new();
    for revision in &arguments.compare {
        let (short, program) = compare::build(repo, revision)?;
        all.push((format!("ublkup {short}"), program));
    }
    if let Some(server) = &arguments.server {
        all.push(("ublkup".to_owned(), server.clone()));
    } else if all.len() < 2 {
        packages::ensure(&[Purpose::ServerBuild], arguments.yes)?;
        let product = cargo::build_server(repo, Build::Product)?;
        all.push(("ublkup".to_owned(), product));
    }
    Ok(all)
}

/// Writes the document, and its tables into a folder.
fn write(document: &Document, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let put = |name: &str, text: &str| {
        let path = folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    let json = serde_json::to_string_pretty(document).context("cannot encode the results")?;
    put("bench.json", &json)?;
    put("bench.md", &table::markdown(document))
}

/// Between these lines of the page is what a run wrote.
const MARKS: [&str; 2] = ["<!-- results begin -->\n", "<!-- results end -->\n"];

/// Replaces the tables in the page of results.
fn write_docs(document: &Document, page: &Path) -> Result<()> {
    let text =
        fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
    let text = with_results(&text, &table::markdown(document))
        .with_context(|| format!("{} has no place for results", page.display()))?;
    fs::write(page, text).with_context(|| format!("cannot write {}", page.display()))
}

/// A page with other results.
fn with_results(page: &str, results: &str) -> Option<String> {
    let (before, rest) = page.split_once(MARKS[0])?;
    let (_, after) = rest.split_once(MARKS[1])?;
    Some(format!(
        "{before}{}\n{}\n\n{}{after}",
        MARKS[0],
        results.trim(),
        MARKS[1]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_replace_results_and_nothing_else() {
        let page = format!("# a\n\n{}old\n{}\nend\n", MARKS[0], MARKS[1]);
        let once = with_results(&page, "new\n").expect("there is a place");
        assert!(
            once.starts_with("# a\n") && once.ends_with("\nend\n"),
            "{once}"
        );
        assert!(once.contains("\nnew\n") && !once.contains("old"), "{once}");
        assert_eq!(with_results(&once, "new"), Some(once));
        assert_eq!(with_results("# a\n", "new"), None);
    }

    #[test]
    fn the_page_of_results_has_a_place_for_them() {
        let page = include_str!("../../../docs/benchmark-results.md");
        assert!(with_results(page, "new").is_some());
    }
}
