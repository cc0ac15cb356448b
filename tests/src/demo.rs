//! `cargo lab demo`: the whole story, told while it happens.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::cargo::Build;
use crate::kernel::Kernel;
use crate::report::line;
use crate::runner;
use crate::suites::{Need, upgraded};
use crate::test::Context;

/// Prepares what is missing, then tells the story.
pub fn run(repo: &Path, yes: bool) -> Result<ExitCode> {
    let needs = [
        Need::Tools,
        Need::Server,
        Need::Kernel(Kernel::Uml),
        Need::Kernel(Kernel::X86),
    ];
    let paths = runner::prepare(repo, &needs, Build::Product, yes)?;
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
