//! The costs of the last landed tree, `tests/guard.toml`, and how others stand to them.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use testkit::shell::Shell;

use super::cost::{Cost, Load, Storage};
use super::rounds::Op;

/// Where the costs are, in a checkout.
pub const FILE: &str = "tests/guard.toml";

/// How much more than before a request may cost.
const TOLERANCE: f64 = 0.02;

/// What the figures depend on besides the server's code.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conditions {
    /// The compiler that built the server, in its own words, and its flags.
    pub compiler: String,
    /// The C library's version.
    pub libc: String,
    /// The kernel's version: files are its work too.
    pub kernel: String,
}

impl Conditions {
    /// Those of this machine.
    pub fn here() -> Result<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("cannot read the kernel's release")?;
        // SAFETY: the C library returns a string of its own.
        let libc = unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) };
        let compiler = Shell::new("rustc").arg("-V").run()?;
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        Ok(Self {
            compiler: format!("{} {flags}", compiler.trim()).trim().to_owned(),
            libc: libc.to_string_lossy().into_owned(),
            kernel: release.split('.').take(2).collect::<Vec<_>>().join("."),
        })
    }
}

/// The costs of a tree, by load.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Costs {
    /// Under which they were counted.
    pub counted: Conditions,
    /// What a request costs, by the name of its load.
    pub cost: BTreeMap<String, Cost>,
}

/// What the file says of itself.
const HEADING: &str = "\
# What one request costs a server, as `cargo lab bench guard` counts it: of the last landed tree.
# `cargo lab bench guard --update` writes this file; docs/lab.md says when.
";

impl Costs {
    /// Those of a checkout.
    pub fn of(repo: &Path) -> Result<Self> {
        let path = repo.join(FILE);
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        toml::from_str(&text).with_context(|| format!("{} is not as it should be", path.display()))
    }

    /// Makes them those of a checkout.
    pub fn write(&self, repo: &Path) -> Result<()> {
        let path = repo.join(FILE);
        fs::write(&path, self.text()).with_context(|| format!("cannot write {}", path.display()))
    }

    fn text(&self) -> String {
        let Conditions {
            compiler,
            libc,
            kernel,
        } = &self.counted;
        let mut text = format!(
            "{HEADING}\n[counted]\ncompiler = \"{compiler}\"\nlibc = \"{libc}\"\nkernel = \"{kernel}\"\n"
        );
        for (load, cost) in &self.cost {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n[cost.\"{load}\"]\n");
            for (name, figure) in cost.figures() {
                if let Some(figure) = figure {
                    let _ = writeln!(text, "{name} = {figure:.4}");
                }
            }
        }
        text
    }
}

/// How a figure stands to the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Within the tolerance.
    Same,
    /// Less by more than that.
    Better,
    /// More by more than that.
    Worse,
    /// Not to be compared, and why.
    NotCompared(&'static str),
}

/// One figure of one load, before and now.
#[derive(Clone, Debug)]
pub struct Line {
    /// The load.
    pub load: String,
    /// What is counted.
    pub what: &'static str,
    /// Before.
    pub before: Option<f64>,
    /// Now.
    pub now: Option<f64>,
    /// How it stands.
    pub standing: Standing,
}

/// Compares the costs of some loads with those of before.
pub fn compare(loads: &[Load], before: &Costs, now: &Costs) -> Vec<Line> {
    let same_code =
        before.counted.compiler == now.counted.compiler && before.counted.libc == now.counted.libc;
    let same_kernel = before.counted.kernel == now.counted.kernel;
    let mut lines = Vec::new();
    for load in loads {
        let name = load.to_string();
        let figures = |costs: &Costs| costs.cost.get(&name).copied().unwrap_or_default().figures();
        let is_known = before.cost.contains_key(&name);
        for ((what, before), (_, now)) in figures(before).into_iter().zip(figures(now)) {
            let standing = match (before, now) {
                _ if load.storage == Storage::File && !same_kernel => {
                    Standing::NotCompared("another kernel")
                }
                // How often the server wakes up for a flush depends on which of the kernel's threads is first.
                _ if what == "instructions" && load.op == Op::Flush => {
                    Standing::NotCompared("threads of the kernel flush")
                }
                _ if what == "instructions" && !same_code => {
                    Standing::NotCompared("another compiler or C library")
                }
                (Some(before), Some(now)) => standing(before, now),
                (_, None) => Standing::NotCompared("cannot be counted here"),
                // A load that has been added has to be in the file too.
                (None, Some(_)) if !is_known => Standing::Worse,
                (None, Some(_)) => Standing::NotCompared("was not counted before"),
            };
            lines.push(Line {
                load: name.clone(),
                what,
                before,
                now,
                standing,
            });
        }
    }
    lines
}

/// The file has four decimals.
const ROUNDING: f64 = 0.0001;

fn standing(before: f64, now: f64) -> Standing {
    let slack = before * TOLERANCE + ROUNDING;
    if now > before + slack {
        Standing::Worse
    } else if now < before - slack {
        Standing::Better
    } else {
        Standing::Same
    }
}

#[cfg(test)]
mod tests {
    use super::super::cost::LOADS;
    use super::*;

    const PLAIN: Cost = Cost {
        instructions: Some(1000.0),
        system_calls: Some(2.0),
        sleeps: Some(1.0),
        allocations: Some(0.0),
    };

    fn costs(cost: Cost) -> Costs {
        Costs {
            counted: Conditions {
                compiler: "rustc 1".into(),
                libc: "2".into(),
                kernel: "6.18".into(),
            },
            cost: LOADS.iter().map(|load| (load.to_string(), cost)).collect(),
        }
    }

    /// The figures that stand like this.
    fn those(standing: Standing, before: &Costs, now: &Costs) -> Vec<&'static str> {
        let lines = compare(&LOADS[..1], before, now);
        let lines = lines.iter().filter(|line| line.standing == standing);
        lines.map(|line| line.what).collect()
    }

    fn worse(now: Cost) -> Vec<&'static str> {
        those(Standing::Worse, &costs(PLAIN), &costs(now))
    }

    #[test]
    fn each_figure_that_grows_by_more_than_the_tolerance_is_worse() {
        let more = |cost: Cost| worse(cost);
        assert!(more(PLAIN).is_empty());
        let instructions = |count| Cost {
            instructions: Some(count),
            ..PLAIN
        };
        assert!(more(instructions(1019.0)).is_empty());
        assert_eq!(more(instructions(1021.0)), ["instructions"]);
        let system_calls = Some(2.1);
        assert_eq!(
            more(Cost {
                system_calls,
                ..PLAIN
            }),
            ["system-calls"]
        );
        let sleeps = Some(1.03);
        assert_eq!(more(Cost { sleeps, ..PLAIN }), ["sleeps"]);
        // One for a hundred requests, where there was none.
        let allocations = Some(0.01);
        assert_eq!(
            more(Cost {
                allocations,
                ..PLAIN
            }),
            ["allocations"]
        );
    }

    #[test]
    fn what_costs_less_is_told_and_what_cannot_be_counted_is_not_compared() {
        let (before, mut now) = (costs(PLAIN), PLAIN);
        now.instructions = Some(900.0);
        now.allocations = None;
        let now = costs(now);
        assert_eq!(those(Standing::Better, &before, &now), ["instructions"]);
        let why = Standing::NotCompared("cannot be counted here");
        assert_eq!(those(why, &before, &now), ["allocations"]);
    }

    #[test]
    fn a_load_without_figures_is_a_failure() {
        let mut before = costs(PLAIN);
        before.cost.clear();
        let all = those(Standing::Worse, &before, &costs(PLAIN));
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn another_compiler_excuses_instructions_and_nothing_else() {
        let now = Cost {
            instructions: Some(5000.0),
            system_calls: Some(3.0),
            ..PLAIN
        };
        let mut now = costs(now);
        now.counted.compiler = "rustc 2".into();
        let worse = those(Standing::Worse, &costs(PLAIN), &now);
        assert_eq!(worse, ["system-calls"]);
        now.counted.kernel = "7.0".into();
        let worse = those(Standing::Worse, &costs(PLAIN), &now);
        assert_eq!(worse, ["system-calls"], "nothing is behind this disk");
        let lines = compare(&LOADS, &costs(PLAIN), &now);
        let files = lines.iter().filter(|line| line.load.contains("file"));
        assert!(
            files
                .clone()
                .all(|line| line.standing == Standing::NotCompared("another kernel"))
        );
    }

    #[test]
    fn what_is_written_is_read_again() {
        let mut all = costs(PLAIN);
        if let Some(first) = all.cost.values_mut().next() {
            first.instructions = None;
        }
        let again: Costs = toml::from_str(&all.text()).expect("it is as it should be");
        assert_eq!(again, all);
    }

    #[test]
    fn the_file_of_this_tree_has_the_loads_that_are_counted() {
        let text = include_str!("../../../guard.toml");
        let costs: Costs = toml::from_str(text).expect("it is as it should be");
        let there: Vec<&str> = costs.cost.keys().map(String::as_str).collect();
        let mut counted: Vec<String> = LOADS.iter().map(ToString::to_string).collect();
        counted.sort();
        assert_eq!(there, counted);
    }
}
