//! `ublkup reload`: a server that runs is made to serve what its configuration file says now.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use serde::Serialize;
use upgrade_proto::printable;

use super::add::{add, find};
use super::cli::USAGE;
use super::client::stop_export;
use super::left::recorded;
use super::output::{complain, print_json, print_line};
use crate::config::{
    ConfigError, Difference, ExportConfig, Origin, check_name, check_together, read_config,
};
use crate::export::admin::{self, ServerStatus};
use crate::export::name_lock::CONTROL;
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{Configuration, explain};

/// A server that does not answer within this time is reported as not answering.
const SET_LIMIT: Duration = Duration::from_secs(5);

/// What is to be done with an export.
enum Step {
    Add(Box<ExportConfig>),
    Remove,
    Change(Difference),
    /// It cannot be known how it is served.
    Unknown(anyhow::Error),
}

/// What became of an export.
#[derive(Debug, Default, Serialize)]
struct Outcome {
    export: String,
    /// `add`, `remove` or `change`.
    action: &'static str,
    /// What is changed while it is served.
    options: BTreeMap<String, String>,
    /// What takes another server.
    needs_restart: Vec<String>,
    /// Why it was not done.
    error: Option<String>,
}

impl Outcome {
    fn is_complete(&self) -> bool {
        self.error.is_none() && self.needs_restart.is_empty()
    }

    /// What people are told: what was done, and what was not.
    fn tell(&self, dry_run: bool) -> Result<()> {
        let name = &self.export;
        let done = match (self.action, dry_run) {
            ("change", _) if self.options.is_empty() => None,
            ("change", _) => {
                let options = self.options.iter();
                let options = options.map(|(key, value)| format!("{key}={value}"));
                Some(options.collect::<Vec<_>>().join(" "))
            }
            ("add", true) => Some("would be added".into()),
            ("add", false) => Some("added".into()),
            (_, true) => Some("would be removed".into()),
            (_, false) => Some("removed".into()),
        };
        match (&self.error, done) {
            (Some(error), _) => complain(error),
            (None, Some(done)) => print_line(&printable(&format!("{name}: {done}")))?,
            (None, None) => {}
        }
        if !self.needs_restart.is_empty() {
            complain(&format!(
                "{name}: cannot be changed while it is served: {}: that takes a new server: systemctl restart, or by hand ublkup \
                 serve --take-over with the same configuration (guests see a pause)",
                self.needs_restart.join(", ")
            ));
        }
        Ok(())
    }
}

/// Makes a server serve what its configuration file says.
///
/// # Errors
///
/// When there is no such server, or it has no configuration file, or nothing can be printed.
pub fn run(dir: &RuntimeDir, server: Option<&str>, dry_run: bool, json: bool) -> Result<ExitCode> {
    let server = find(dir, server)?;
    let wanted = match read(&configuration(dir, &server.server)?) {
        Ok(wanted) => wanted,
        Err(error) => {
            complain(&error.to_string());
            return Ok(USAGE.into());
        }
    };
    let steps = plan(dir, &server, wanted);
    let outcomes = match dry_run {
        true => steps.into_iter().map(outcome).collect(),
        false => apply(dir, &server, steps),
    };
    if json {
        print_json(&outcomes)?;
    } else if outcomes.is_empty() {
        print_line("nothing has changed")?;
    }
    for outcome in outcomes.iter().filter(|_| !json) {
        outcome.tell(dry_run)?;
    }
    Ok(match outcomes.iter().all(Outcome::is_complete) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Where a server got its exports from. The server itself is not asked: it may be in the hands of a guest, which would have
/// this process open any file for it.
fn configuration(dir: &RuntimeDir, server: &str) -> Result<Configuration> {
    let record = dir.server_record(server)?.read()?.with_context(|| {
        format!(
            "server '{server}' was started without a configuration file: 'ublkup add' adds an export"
        )
    })?;
    serde_json::from_str(&record).with_context(|| {
        format!("cannot understand where server '{server}' got its exports from (another version?)")
    })
}

fn read(configuration: &Configuration) -> Result<Vec<ExportConfig>, ConfigError> {
    let wanted = read_config(&configuration.path, &configuration.options)?;
    check_together(&wanted)?;
    Ok(wanted)
}

/// What is to be done, by export: what goes, what changes, what comes.
fn plan(dir: &RuntimeDir, server: &ServerStatus, wanted: Vec<ExportConfig>) -> Vec<(String, Step)> {
    let served: BTreeSet<_> = server.exports.iter().collect();
    let (mut gone, mut changed, mut new) = (Vec::new(), Vec::new(), Vec::new());
    for name in &server.exports {
        if let Err(error) = is_served_by(dir, name, &server.server) {
            changed.push((name.clone(), Step::Unknown(error)));
            continue;
        }
        let wanted = wanted.iter().find(|export| export.name == *name);
        match (recorded(dir, name), wanted) {
            (Ok(saved), None) if saved.origin == Origin::Config => {
                gone.push((name.clone(), Step::Remove));
            }
            (Ok(_), None) => {}
            (Ok(saved), Some(_)) if saved.origin != Origin::Config => {
                let error = anyhow!(
                    "{name} is in the configuration, and is served as the command line or 'ublkup add' said: stop it, and \
                     reload again"
                );
                changed.push((name.clone(), Step::Unknown(error)));
            }
            (Ok(saved), Some(wanted)) => match saved.difference(wanted) {
                Ok(difference) if difference == Difference::default() => {}
                Ok(difference) => changed.push((name.clone(), Step::Change(difference))),
                Err(error) => {
                    let error = anyhow!(error).context(name.clone());
                    changed.push((name.clone(), Step::Unknown(error)));
                }
            },
            (Err(error), _) => {
                let error = error.context(format!("{name}: cannot know how it is served"));
                changed.push((name.clone(), Step::Unknown(error)));
            }
        }
    }
    for export in wanted {
        if !served.contains(&export.name) {
            new.push((export.name.clone(), Step::Add(export.into())));
        }
    }
    [gone, changed, new].into_iter().flatten().collect()
}

/// Makes sure that an export is this server's, as who answers for it says: a server cannot answer for others.
fn is_served_by(dir: &RuntimeDir, name: &str, server: &str) -> Result<()> {
    check_name(name)?;
    let status = admin::stat(&dir.folder(name).join(CONTROL), SET_LIMIT)
        .with_context(|| format!("{name} does not answer"))?;
    let other = status.server;
    ensure!(
        other == server,
        "{name} is not served by '{server}', which says so, but by '{other}'"
    );
    Ok(())
}

/// What a step does.
fn outcome((export, step): (String, Step)) -> Outcome {
    let outcome = |action| Outcome {
        export,
        action,
        ..Outcome::default()
    };
    match step {
        Step::Add(_) => outcome("add"),
        Step::Remove => outcome("remove"),
        Step::Change(Difference { live, fixed }) => Outcome {
            options: live,
            needs_restart: fixed,
            ..outcome("change")
        },
        Step::Unknown(error) => Outcome {
            error: Some(explain(&error)),
            ..outcome("change")
        },
    }
}

/// Does what is to be done. What cannot be done keeps nothing else from it.
fn apply(dir: &RuntimeDir, server: &ServerStatus, steps: Vec<(String, Step)>) -> Vec<Outcome> {
    let mut serving = server.exports.len();
    let mut outcomes = Vec::new();
    let mut last = None;
    let mut apply = |(name, step): (String, Step), serving: &mut usize| {
        let result = match &step {
            Step::Unknown(_) => Ok(()),
            Step::Add(export) => add(dir, server, export).map(|_| *serving += 1),
            Step::Remove if *serving == 1 => Err(anyhow!(
                "{name} is not removed: it is the last one, and the server would end with it: stop the server instead"
            )),
            Step::Remove => stop_export(dir, &name, false, || {})
                .map(|()| *serving -= 1)
                .with_context(|| format!("{name} is not removed")),
            Step::Change(difference) if difference.live.is_empty() => Ok(()),
            Step::Change(difference) => {
                let control = dir.folder(&name).join(CONTROL);
                admin::set(&control, difference.live.clone(), SET_LIMIT)
                    .with_context(|| format!("{name} stays as it is"))
            }
        };
        let mut outcome = outcome((name, step));
        outcome.error = outcome.error.or(result.err().map(|error| explain(&error)));
        outcomes.push(outcome);
    };
    for (name, step) in steps {
        // A server ends with its last export: that goes when others have come.
        match step {
            Step::Remove if serving == 1 => last = Some((name, step)),
            step => apply((name, step), &mut serving),
        }
    }
    if let Some(step) = last {
        apply(step, &mut serving);
    }
    outcomes
}
