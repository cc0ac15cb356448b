//! `cargo lab demo`: the whole story, told while it happens.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::cargo::Build;
use crate::kernel::{Kernel, build};
use crate::packages::guest_kernel::GuestKernel;
use crate::packages::{self, Purpose};
use crate::report::line;
use crate::runner;
use crate::suites::{Need, upgraded};
use crate::test::Context;

/// Prepares what is missing, then tells the story.
pub fn run(repo: &Path, yes: bool) -> Result<ExitCode> {
    let mut needs = vec![Need::Tools, Need::Server, Need::Kernel(Kernel::Uml)];
    let guest_kernel = match build::is_cached(repo, Kernel::X86)? {
        true => None,
        // One kernel less to build. What builds the other one unpacks and packs this one, too.
        false => packages::ensure(&[Purpose::KernelBuild], yes)
            .and_then(|()| GuestKernel::get())
            .inspect_err(|error| line(&format!("{error:#}: one is built instead")))
            .ok(),
    };
    if guest_kernel.is_none() {
        needs.push(Need::Kernel(Kernel::X86));
    }
    let mut paths = runner::prepare(repo, &needs, Build::Product, yes)?;
    paths.guest_kernel = guest_kernel;
    let (_folder, cx) = Context::on_host(paths)?;
    let started = Instant::now();
    let say = |text: &str| line(&format!("{:4} s  {text}", started.elapsed().as_secs()));
    let findings = upgraded::tell(&cx, &[1, 16].map(upgraded::Load::one_by_one), &say)?;
    say("the end: one disk, two doors, and a descriptor that leads from the first to the second");
    line("");
    for row in upgraded::table(&findings) {
        line(&row);
    }
    Ok(ExitCode::SUCCESS)
}
