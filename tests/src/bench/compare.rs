//! `--compare`: the servers of other revisions, built aside, and how two servers of ours stand to
//! each other.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testkit::shell::Shell;

use super::record::{Ratio, Row};
use crate::cache;
use crate::cargo::{self, Profile};

/// The server of a revision, built in a worktree in the cache; its short name and its program.
pub fn build(repo: &Path, revision: &str) -> Result<(String, PathBuf)> {
    let git = |args: &[&str]| Shell::new("git").args(args).dir(repo).run();
    let commit = format!("{revision}^{{commit}}");
    let hash = git(&["rev-parse", "--verify", "--quiet", &commit])
        .with_context(|| format!("there is no revision {revision}"))?;
    let hash = hash.trim();
    let short = hash.get(..12).context("git has strange hashes")?.to_owned();
    let _one_at_a_time = cache::lock("bench")?;
    let home = cache::dir()?.join("bench");
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let program = home.join(format!("ublkup-{short}"));
    if program.exists() {
        return Ok((short, program));
    }
    let tree = home.join("source");
    let tree_name = tree.to_str().context("a cache whose name is no text")?;
    // What a killed run left is of no use; usually there is nothing.
    let _nothing = git(&["worktree", "remove", "--force", tree_name]);
    git(&["worktree", "add", "--detach", tree_name, hash])?;
    let target = home.join("target");
    let built = cargo::build_server_of(&tree, &target, Profile::Release, &[]);
    git(&["worktree", "remove", "--force", tree_name])?;
    let built = built.with_context(|| format!("revision {revision}"))?;
    let partial = home.join("partial");
    fs::copy(&built, &partial)
        .and_then(|_| fs::rename(&partial, &program))
        .with_context(|| format!("cannot keep {}", program.display()))?;
    ensure!(program.exists(), "{} is gone", program.display());
    Ok((short, program))
}

/// The second server over the first, in each row that has both with the same settings.
pub fn ratios(rows: &[Row], first: &str, second: &str) -> Vec<Ratio> {
    let mut all = Vec::new();
    for row in rows {
        for one in &row.candidates {
            let Some(settings) = one.name.strip_prefix(second) else {
                continue;
            };
            let Some(other) = row.candidate(&format!("{first}{settings}")) else {
                continue;
            };
            let cpu = one.cpu_us_per_io.as_ref().zip(other.cpu_us_per_io.as_ref());
            if let Some(iops) = one.iops.ratio(&other.iops) {
                all.push(Ratio {
                    what: format!("{}, {}", row.title, row.load),
                    above: one.name.clone(),
                    below: other.name.clone(),
                    iops,
                    cpu: cpu.and_then(|(ours, theirs)| ours.ratio(theirs)),
                });
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::figures::Samples;
    use super::super::record::Candidate;
    use super::*;

    #[test]
    fn revisions_are_compared_where_their_settings_are_the_same() {
        let candidate = |name: &str, iops: f64| Candidate {
            name: name.to_owned(),
            iops: Samples::of(&[iops]).expect("there is a sample"),
            ..Candidate::default()
        };
        let row = Row {
            lane: "native".to_owned(),
            title: "t".to_owned(),
            load: "l".to_owned(),
            candidates: vec![
                candidate("ublkup aaa", 10.0),
                candidate("ublkup bbb", 30.0),
                candidate("ublkup bbb --poll-us always", 30.0),
                candidate("qemu-storage-daemon", 1.0),
            ],
        };
        let ratios = ratios(&[row], "ublkup aaa", "ublkup bbb");
        assert_eq!(ratios.len(), 1, "{ratios:?}");
        assert!((ratios[0].iops.median - 3.0).abs() < 1e-9);
    }
}
