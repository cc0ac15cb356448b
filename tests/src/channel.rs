//! The messages between a machine and the process that started it: lines of JSON, each
//! behind a mark, on a line of their own that no console text shares.
//!
//! Anything without the mark is noise (User Mode Linux itself prints a little
//! before its kernel starts) and is handed on as such. A line that carries the
//! mark and cannot be read, or a stream that ends inside a line, is an error:
//! a result that was cut short must never be lost silently.

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::job::Job;
use crate::report::TestResult;

const MARK: &str = "@lab ";

/// What a guest is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ToGuest {
    /// Run this test and answer with [`FromGuest::Done`].
    Run(Box<Job>),
    /// End the machine.
    PowerOff,
}

/// What a guest says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FromGuest {
    /// The agent is ready.
    Hello {
        /// The kernel's release.
        kernel: String,
        /// Trouble in the log of the boot.
        trouble: Vec<String>,
    },
    /// The guest lives: said every second from [`FromGuest::Hello`] on, whatever else it does.
    Beat,
    /// The test has ended.
    Done(Box<TestResult>),
    /// The command of a shell machine has ended with this code.
    Exit {
        /// The exit code.
        code: i32,
    },
    /// The agent cannot go on.
    Broken {
        /// Why.
        why: String,
    },
}

/// Writes one message.
pub fn send<T: Serialize>(to: &mut impl Write, message: &T) -> Result<()> {
    let mut line = MARK.to_owned();
    line.push_str(&serde_json::to_string(message).context("cannot encode a message")?);
    line.push('\n');
    to.write_all(line.as_bytes())
        .and_then(|()| to.flush())
        .context("the other side of the channel is gone")
}

/// One thing read from a channel.
#[derive(Debug)]
pub enum Heard<T> {
    /// A message.
    Message(T),
    /// A line that is none.
    Noise(String),
    /// The orderly end of the stream.
    End,
}

/// Reads the next line.
pub fn hear<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Heard<T>> {
    let mut bytes = Vec::new();
    from.read_until(b'\n', &mut bytes)
        .context("cannot read from the channel")?;
    if bytes.is_empty() {
        return Ok(Heard::End);
    }
    let complete = bytes.pop_if(|last| *last == b'\n').is_some();
    let line = String::from_utf8_lossy(&bytes);
    let line = line.trim_end_matches('\r');
    match line.find(MARK) {
        Some(_) if !complete => bail!("the channel ended inside a message: {line}"),
        Some(at) => serde_json::from_str(&line[at + MARK.len()..])
            .map(Heard::Message)
            .with_context(|| format!("a damaged message on the channel: {line}")),
        None => Ok(Heard::Noise(line.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Outcome;
    use std::time::Duration;

    fn done() -> Vec<u8> {
        let mut bytes = Vec::new();
        let result = TestResult::new("a_test", Outcome::fail("two\nlines"), Duration::ZERO);
        send(&mut bytes, &FromGuest::Done(Box::new(result))).expect("a Vec takes everything");
        bytes
    }

    #[test]
    fn a_message_arrives_whole_and_on_one_line() {
        let bytes = done();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        match hear(&mut bytes.as_slice()).expect("it is whole") {
            Heard::Message(FromGuest::Done(result)) => {
                assert_eq!(result.outcome, Outcome::fail("two\nlines"));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_message_cut_short_anywhere_is_never_a_result() {
        let bytes = done();
        for length in MARK.len()..bytes.len() {
            let heard = hear::<FromGuest>(&mut &bytes[..length]);
            assert!(heard.is_err(), "{length} bytes: {heard:?}");
        }
    }

    #[test]
    fn noise_before_a_message_is_kept_apart() {
        let mut bytes = b"Core dump limits :\r\n".to_vec();
        bytes.extend(done());
        let mut stream = bytes.as_slice();
        let first = hear::<FromGuest>(&mut stream).expect("a line");
        assert!(matches!(first, Heard::Noise(text) if text == "Core dump limits :"));
        let second = hear::<FromGuest>(&mut stream).expect("a line");
        assert!(matches!(second, Heard::Message(FromGuest::Done(_))));
        let third = hear::<FromGuest>(&mut stream).expect("the end");
        assert!(matches!(third, Heard::End));
    }

    #[test]
    fn a_damaged_message_is_an_error() {
        let mut bytes = done();
        bytes[10] = b'#';
        assert!(hear::<FromGuest>(&mut bytes.as_slice()).is_err());
    }
}
