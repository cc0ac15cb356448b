//! The command line.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use crate::kernel::{Kernel, build, mutants, tree};
use crate::kit::load;
use crate::machine::{Hypervisor, Qemu, Uml, shell};
use crate::packages::{self, Purpose};
use crate::report::line;
use crate::runner::{self, Request};
use crate::{agent, bench, demo, doctor, fuzz, guest, job, kublk, package};

/// Kernels, machines and tests for ublkup.
#[derive(Parser)]
#[command(name = "cargo lab", bin_name = "cargo lab")]
struct Cli {
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// From a fresh machine to a served disk: packages, kernels, server, a Linux that mounts the
    /// block device and a QEMU guest that mounts the vhost-user-blk disk
    Demo {
        /// Install what is missing without asking
        #[arg(long)]
        yes: bool,
    },
    /// Runs test suites; the last line is `N passed, N failed, N skipped`
    Test(Request),
    /// Measures against others in the same run; writes JSON and tables
    Bench(bench::Arguments),
    /// Runs fuzz targets: hostile guests, clients, users and files
    Fuzz(fuzz::Arguments),
    /// Breaks the server's code in one place at a time; its tests must notice (hours)
    Mutants {
        /// Only these files (globs); the vhost-user door, ownership and the file storage if none is named
        files: Vec<String>,
        /// Print the mutants
        #[arg(long)]
        list: bool,
    },
    /// Builds, boots and edits the lab's kernels
    Kernel {
        #[command(subcommand)]
        action: KernelAction,
    },
    /// Builds the .deb and the .rpm, for the release that this machine runs and later ones; prints their paths
    Package {
        /// The packages' revision of this version
        #[arg(long, default_value_t = 1)]
        revision: u32,
        /// Install what is missing without asking
        #[arg(long)]
        yes: bool,
    },
    /// Says what this machine can and cannot run, and what to install
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Installs what builds and tests need
    Setup {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },
    /// Runs one test; the lab calls itself with this
    #[command(name = job::SUBCOMMAND, hide = true)]
    RunOneTest,
    /// Loads a vhost-user-blk socket; the lab calls itself with this
    #[command(name = bench::client::SUBCOMMAND, hide = true)]
    BenchClient,
    /// Takes kublk's command line, for the kernel's tests; the lab calls itself with this
    #[command(name = kublk::SUBCOMMAND, hide = true)]
    Kublk {
        /// kublk's command and options
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        words: Vec<String>,
    },
    /// One end of a pipe or ring; the lab calls itself with this
    #[command(name = bench::ring::peer::SUBCOMMAND, hide = true)]
    BenchRingPeer {
        /// What to do, as JSON
        order: String,
    },
    /// Serves a guest's channel; the lab calls itself with this
    #[command(name = guest::AGENT, hide = true)]
    GuestAgent,
}

#[derive(Subcommand)]
enum KernelAction {
    /// Builds kernels, unless the cache has them; prints their paths
    Build {
        /// Which; those that tests usually need if none is named
        kernels: Vec<Kernel>,
        /// Install what is missing without asking
        #[arg(long)]
        yes: bool,
    },
    /// Boots a kernel and runs a shell, or a command, in it
    Shell {
        /// Which
        #[arg(default_value = "uml")]
        kernel: Kernel,
        /// The command and its arguments
        #[arg(last = true)]
        command: Vec<String>,
    },
    /// Makes the editable source tree and prints where it is
    Edit,
    /// Turns the commits of the editable tree into the patches in kernel-patch
    Refresh,
    /// Breaks the series in each of the ways of kernel-patch/mutants; its tests must notice (half an hour)
    Mutants {
        /// Only those with this in their name
        #[arg(default_value = "")]
        pattern: String,
        /// Install what is missing without asking
        #[arg(long)]
        yes: bool,
    },
}

/// Runs the command line and says what went wrong.
pub fn main() -> ExitCode {
    if guest::is_init() {
        return guest::init_main();
    }
    if load::is_init() {
        return load::init_main();
    }
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(action: Action) -> Result<ExitCode> {
    match action {
        Action::Demo { yes } => demo::run(&runner::repo()?, yes),
        Action::Test(request) => runner::run(&runner::repo()?, &request),
        Action::Bench(arguments) => bench::run(&runner::repo()?, &arguments),
        Action::Fuzz(arguments) => fuzz::run(&runner::repo()?, &arguments),
        Action::Mutants { files, list } => crate::mutants::run(&runner::repo()?, &files, list),
        Action::Kernel { action } => run_kernel(action),
        Action::Package { revision, yes } => {
            packages::ensure(&[Purpose::ServerBuild, Purpose::Package], yes)?;
            let built = package::build(&runner::repo()?, revision)?;
            line(&built.deb.display().to_string());
            line(&built.rpm.display().to_string());
            Ok(ExitCode::SUCCESS)
        }
        Action::Doctor { json } => Ok(if doctor::run(json)? {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }),
        Action::Setup { yes } => {
            packages::ensure(&Purpose::ALL, yes)?;
            line("everything that builds and tests need is installed");
            Ok(ExitCode::SUCCESS)
        }
        Action::RunOneTest => job::child_main(),
        Action::BenchClient => bench::client::child_main(),
        Action::Kublk { words } => Ok(kublk::main(&words)),
        Action::BenchRingPeer { order } => bench::ring::peer::child_main(&order),
        Action::GuestAgent => agent::main(),
    }
}

fn run_kernel(action: KernelAction) -> Result<ExitCode> {
    let repo = runner::repo()?;
    match action {
        KernelAction::Build { kernels, yes } => {
            let kernels = if kernels.is_empty() {
                Kernel::USUAL.to_vec()
            } else {
                kernels
            };
            for image in build::kernels(&repo, &kernels, yes)? {
                line(&image.display().to_string());
            }
        }
        KernelAction::Shell { kernel, command } => {
            let images = build::kernels(&repo, &[kernel], false)?;
            let image = images.first().context("no kernel was built")?;
            let hypervisor: Box<dyn Hypervisor> = if kernel.is_uml() {
                Box::new(Uml::new(image))
            } else {
                packages::ensure(&[Purpose::Tests], false)?;
                Box::new(Qemu::new(image))
            };
            return shell::run(hypervisor.as_ref(), &repo, command);
        }
        KernelAction::Mutants { pattern, yes } => return mutants::run(&repo, &pattern, yes),
        KernelAction::Edit => {
            let dir = tree::ensure_tree(&repo)?;
            line(&dir.display().to_string());
        }
        KernelAction::Refresh => {
            let count = tree::refresh(&repo)?;
            line(&format!("{count} patches in kernel-patch"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_for_a_guest_follows_two_dashes() {
        let words = ["lab", "kernel", "shell", "x86_64", "--", "uname", "-a"];
        let cli = Cli::try_parse_from(words).expect("it is valid");
        let Action::Kernel {
            action: KernelAction::Shell { kernel, command },
        } = cli.command
        else {
            panic!("another command");
        };
        assert_eq!(kernel, Kernel::X86);
        assert_eq!(command, ["uname", "-a"]);
    }
}
