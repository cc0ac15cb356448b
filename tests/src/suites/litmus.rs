//! The ordering of rings, asked of the kernel's memory model: litmus tests of the series, run with
//! herd7. Emulated processors do not reorder enough to show a missing barrier; the model does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use testkit::shell::Shell;

use crate::skip;
use crate::test;
use crate::test::{Context, Test};

/// Anywhere: they need no kernel but its memory model.
pub const TESTS: &[Test] = &[
    test!(herd7_tells_ordered_from_unordered),
    test!(litmus_tests_find_what_they_say),
    test!(no_barrier_of_a_litmus_test_can_go),
];

/// Below the directory of the kernel's test programs.
pub const DIR: &str = "litmus";

/// What the model says about one test.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// `Never`, `Sometimes` or `Always`: how often the outcome that is asked about exists.
    observation: String,
    has_data_race: bool,
}

impl Answer {
    fn is_never(&self) -> bool {
        self.observation == "Never" && !self.has_data_race
    }
}

struct Model {
    herd7: PathBuf,
    dir: PathBuf,
}

impl Model {
    fn of(cx: &Context) -> Result<Model> {
        let all = cx.paths.selftests.as_deref();
        let dir = all
            .context("this run has not built the kernel's tests")?
            .join(DIR);
        let Some(herd7) = cx.paths.herd7.clone() else {
            skip!("there is no herd7 here: it comes from Debian's newer releases");
        };
        Ok(Model { herd7, dir })
    }

    /// The litmus tests of the series: name and text.
    fn tests(&self) -> Result<Vec<(String, String)>> {
        let dir = self.dir.join("ringbuffer");
        let mut tests = Vec::new();
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == "litmus") {
                let name = path.file_stem().unwrap_or_default().to_string_lossy();
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                tests.push((name.into_owned(), text));
            }
        }
        tests.sort();
        ensure!(tests.len() >= 8, "only {} litmus tests", tests.len());
        Ok(tests)
    }

    /// herd7 with the loader and the libraries that were unpacked with it.
    fn herd7(&self) -> Shell {
        Shell::new(self.herd7.join("usr/lib64/ld-linux-x86-64.so.2"))
            .arg("--library-path")
            .arg(self.herd7.join("usr/lib/x86_64-linux-gnu"))
            .arg(self.herd7.join("usr/bin/herd7"))
            .arg("-set-libdir")
            .arg(self.herd7.join("usr/share/herdtools7/herd"))
    }

    fn ask(&self, cx: &Context, text: &str) -> Result<Answer> {
        let file = cx.scratch().join("asked.litmus");
        fs::write(&file, text).context("cannot write a litmus test")?;
        let said = self
            .herd7()
            .args(["-conf", "linux-kernel.cfg"])
            .arg(&file)
            .dir(&self.dir.join("model"))
            .limit(cx.patience(60))
            .run()?;
        answer(&said)
    }
}

/// Reads what herd7 prints.
fn answer(said: &str) -> Result<Answer> {
    let observation = said
        .lines()
        .find_map(|line| line.strip_prefix("Observation ")?.split(' ').nth(1))
        .with_context(|| format!("herd7 says nothing that is known:\n{said}"))?;
    Ok(Answer {
        observation: observation.to_owned(),
        has_data_race: said.lines().any(|line| line.starts_with("Flag data-race")),
    })
}

/// What a barrier becomes when it is weakened.
const WEAKER: [(&str, &str); 3] = [
    ("smp_store_release(", "WRITE_ONCE(*"),
    ("smp_load_acquire(", "READ_ONCE(*"),
    ("smp_mb();", ""),
];

/// The same test with one barrier weakened, for each barrier: its statement, and the test.
fn weakened(text: &str) -> Vec<(&str, String)> {
    // Not those that the comment at the top speaks of.
    let code = text.rfind("*)").unwrap_or(0);
    let mut all = Vec::new();
    for (barrier, weaker) in WEAKER {
        for (at, _) in text[code..].match_indices(barrier) {
            let (before, rest) = text.split_at(code + at);
            let statement = rest.lines().next().unwrap_or(rest);
            let after = &rest[barrier.len()..];
            all.push((statement, format!("{before}{weaker}{after}")));
        }
    }
    all
}

fn herd7_tells_ordered_from_unordered(cx: &Context) -> Result<()> {
    let model = Model::of(cx)?;
    for (name, expected) in [
        ("SB+poonceonces", "Sometimes"),
        ("SB+fencembonceonces", "Never"),
    ] {
        let file = model.dir.join("model").join(format!("{name}.litmus"));
        let answer = model.ask(cx, &fs::read_to_string(&file)?)?;
        ensure!(answer.observation == expected, "{name}: {answer:?}");
    }
    Ok(())
}

fn litmus_tests_find_what_they_say(cx: &Context) -> Result<()> {
    let model = Model::of(cx)?;
    for (name, text) in model.tests()? {
        ensure!(text.contains(" * Result: Never\n"), "{name} has no result");
        let answer = model.ask(cx, &text)?;
        println!("{name}: {}", answer.observation);
        ensure!(answer.is_never(), "{name}: {answer:?}");
    }
    Ok(())
}

fn no_barrier_of_a_litmus_test_can_go(cx: &Context) -> Result<()> {
    let model = Model::of(cx)?;
    let mut count = 0;
    for (name, text) in model.tests()? {
        let weakened = weakened(&text);
        ensure!(!weakened.is_empty(), "{name} has no barrier");
        for (statement, text) in weakened {
            let answer = model.ask(cx, &text)?;
            println!("{name} without {statement} {answer:?}");
            ensure!(
                answer.observation == "Sometimes",
                "{name} holds without {statement}"
            );
            count += 1;
        }
    }
    println!("{count} barriers, each of them needed");
    Ok(())
}

/// Copies what herd7 needs of a source tree.
pub fn collect(tree: &Path, into: &Path) -> Result<()> {
    let model = into.join("model");
    let ours = into.join("ringbuffer");
    for dir in [&model, &ours] {
        fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    }
    let from = tree.join("tools/memory-model");
    let copy = |from: PathBuf, to: &Path| -> Result<()> {
        let name = from.file_name().context("no file")?;
        fs::copy(&from, to.join(name))
            .with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    };
    for name in [
        "linux-kernel.bell",
        "linux-kernel.cat",
        "linux-kernel.cfg",
        "linux-kernel.def",
        "lock.cat",
        "litmus-tests/SB+poonceonces.litmus",
        "litmus-tests/SB+fencembonceonces.litmus",
    ] {
        copy(from.join(name), &model)?;
    }
    let tests = tree.join("Documentation/litmus-tests/ringbuffer");
    for entry in fs::read_dir(&tests).with_context(|| format!("cannot list {}", tests.display()))? {
        copy(entry?.path(), &ours)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_is_read() {
        let said =
            "Test T Allowed\nStates 2\nFlag data-race\nObservation T Sometimes 1 3\nTime T 0\n";
        let expected = Answer {
            observation: "Sometimes".into(),
            has_data_race: true,
        };
        assert_eq!(answer(said).expect("an answer"), expected);
        assert!(answer("Warning: no such file").is_err());
    }

    #[test]
    fn each_barrier_is_weakened_by_itself() {
        let text =
            "(* smp_mb(); *)\nsmp_store_release(x, 1);\nsmp_mb();\nr0 = smp_load_acquire(y);\n";
        let all: Vec<String> = weakened(text).into_iter().map(|(_, text)| text).collect();
        assert_eq!(
            all,
            [
                "(* smp_mb(); *)\nWRITE_ONCE(*x, 1);\nsmp_mb();\nr0 = smp_load_acquire(y);\n",
                "(* smp_mb(); *)\nsmp_store_release(x, 1);\nsmp_mb();\nr0 = READ_ONCE(*y);\n",
                "(* smp_mb(); *)\nsmp_store_release(x, 1);\n\nr0 = smp_load_acquire(y);\n",
            ]
        );
    }
}
