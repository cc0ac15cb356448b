//! Results: of one test, of many, and how they are shown.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "lowercase")]
pub enum Outcome {
    /// Everything held.
    Pass,
    /// Something did not.
    Fail {
        /// What, in words.
        message: String,
    },
    /// It could not be tried.
    Skip {
        /// Why.
        reason: String,
    },
}

impl Outcome {
    /// A failure with this message.
    pub fn fail(message: impl Into<String>) -> Self {
        Outcome::Fail {
            message: message.into(),
        }
    }
}

/// One test's result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TestResult {
    /// The test's name.
    pub name: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub duration_ms: u64,
    /// The end of what it printed.
    #[serde(default)]
    pub output: String,
    /// What a step handed back (see [`crate::test::Context::reply`]).
    #[serde(default)]
    pub reply: Value,
    /// The machine should not be used any more.
    #[serde(default)]
    pub machine_is_suspect: bool,
}

impl TestResult {
    /// A result without output.
    pub fn new(name: impl Into<String>, outcome: Outcome, duration: Duration) -> Self {
        TestResult {
            name: name.into(),
            outcome,
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            output: String::new(),
            reply: Value::Null,
            machine_is_suspect: false,
        }
    }

    /// The failure of a test that could not be run.
    pub fn not_run(name: impl Into<String>, why: impl Into<String>) -> Self {
        TestResult::new(name, Outcome::fail(why), Duration::ZERO)
    }

    /// Turns a pass or a skip into a failure; adds to the message of a failure.
    pub fn spoil(&mut self, why: &str) {
        self.outcome = match &self.outcome {
            Outcome::Fail { message } => Outcome::fail(format!("{message}\n{why}")),
            Outcome::Pass | Outcome::Skip { .. } => Outcome::fail(why),
        };
    }
}

/// Counts of results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Tests that passed.
    pub passed: u64,
    /// Tests that failed.
    pub failed: u64,
    /// Tests that could not be tried.
    pub skipped: u64,
}

impl Totals {
    /// Counts one more result.
    pub fn count(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Pass => self.passed += 1,
            Outcome::Fail { .. } => self.failed += 1,
            Outcome::Skip { .. } => self.skipped += 1,
        }
    }

    /// How many results there are.
    pub fn all(&self) -> u64 {
        self.passed + self.failed + self.skipped
    }

    /// Adds another count.
    pub fn add(&mut self, other: Totals) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// All results of one suite.
#[derive(Clone, Debug, Serialize)]
pub struct SuiteResult {
    /// The suite.
    pub suite: String,
    /// Its tests, in the order they ran.
    pub tests: Vec<TestResult>,
    /// Tests of other runners, which only give counts.
    pub counted: Totals,
}

impl SuiteResult {
    /// A suite without results yet.
    pub fn new(suite: &str) -> Self {
        SuiteResult {
            suite: suite.to_owned(),
            tests: Vec::new(),
            counted: Totals::default(),
        }
    }

    /// Counts of everything in the suite.
    pub fn totals(&self) -> Totals {
        let mut totals = self.counted;
        for test in &self.tests {
            totals.count(&test.outcome);
        }
        totals
    }

    /// Records a result and shows it.
    pub fn push(&mut self, result: TestResult) {
        show(&self.suite, &result);
        self.tests.push(result);
    }
}

/// Prints one line for a result, and the details of a failure.
pub fn show(suite: &str, result: &TestResult) {
    let seconds = format!(
        "{}.{:01} s",
        result.duration_ms / 1000,
        result.duration_ms % 1000 / 100
    );
    let name = format!("{suite}: {}", result.name);
    let text = match &result.outcome {
        Outcome::Pass => format!("{} {name} ({seconds})", paint("pass", "32")),
        Outcome::Skip { reason } => format!("{} {name}: {reason}", paint("skip", "33")),
        Outcome::Fail { message } => {
            let mut text = format!(
                "{} {name} ({seconds})\n{}",
                paint("FAIL", "31"),
                indent(message)
            );
            if !result.output.trim().is_empty() {
                text.push_str("\n  its output ends with:\n");
                text.push_str(&indent(&testkit::shell::last_lines(&result.output, 40)));
            }
            text
        }
    };
    line(&text);
}

/// Prints a line on standard output. A closed pipe is not worth a panic.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _closed = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn paint(word: &str, colour: &str) -> String {
    if std::io::stdout().is_terminal() {
        format!("\x1b[{colour}m{word}\x1b[0m")
    } else {
        word.to_owned()
    }
}

fn indent(text: &str) -> String {
    text.lines()
        .map(|line| format!("    {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_has_the_agreed_form() {
        let mut totals = Totals::default();
        totals.count(&Outcome::Pass);
        totals.count(&Outcome::Pass);
        totals.count(&Outcome::fail("x"));
        assert_eq!(totals.to_string(), "2 passed, 1 failed, 0 skipped");
        assert_eq!(totals.all(), 3);
    }

    #[test]
    fn a_spoilt_pass_or_skip_is_a_failure() {
        let mut result = TestResult::new("t", Outcome::Pass, Duration::ZERO);
        result.spoil("Oops");
        result.spoil("again");
        assert_eq!(result.outcome, Outcome::fail("Oops\nagain"));
    }
}
