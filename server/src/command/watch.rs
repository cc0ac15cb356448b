//! `ublkup events`: what happens to exports, as it happens.

use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::add::server_socket;
use super::output::{complain, print_json_text, print_line};
use crate::export::admin::{self, StreamLine, Watch};
use crate::export::explain;
use crate::export::runtime_dir::RuntimeDir;

/// A server that does not answer within this time is reported as not answering.
const LIMIT: Duration = Duration::from_secs(5);

/// Lines that may wait to be printed. Behind them the servers wait, and drop.
const WAITING_LINES: usize = 64;

/// Prints the events of one export or all, of one server or all, until all of them have ended.
///
/// # Errors
///
/// When there is nothing to watch, or nothing can be printed.
pub fn events(
    dir: &RuntimeDir,
    export: Option<&str>,
    server: Option<&str>,
    json: bool,
) -> Result<ExitCode> {
    let (sender, lines) = mpsc::sync_channel(WAITING_LINES);
    let mut code = ExitCode::SUCCESS;
    for watch in watches(dir, export, server)? {
        match watch {
            Ok(watch) => {
                let sender = sender.clone();
                std::thread::Builder::new()
                    .name("watch".into())
                    .spawn(move || {
                        watch
                            .map_while(Result::ok)
                            .all(|line| sender.send(line).is_ok())
                    })
                    .context("cannot start a thread")?;
            }
            Err(error) => {
                complain(&explain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    drop(sender);
    for line in lines {
        match json {
            true => print_json_text(&line)?,
            false if is_begin(&line) => {}
            false => print_line(&readable(&line))?,
        }
    }
    Ok(code)
}

/// The streams that were asked for.
fn watches(
    dir: &RuntimeDir,
    export: Option<&str>,
    server: Option<&str>,
) -> Result<Vec<Result<Watch>>> {
    let mut servers = dir.server_names()?;
    let all = servers.join(", ");
    servers.retain(|name| server.is_none_or(|wanted| wanted == name));
    match server {
        _ if !servers.is_empty() => {}
        Some(name) if !all.is_empty() => bail!("no server called '{name}' runs; there are: {all}"),
        _ => bail!(
            "no server runs under {}: 'ublkup serve' starts one",
            dir.path().display()
        ),
    }
    let watch = |server: &String| {
        server_socket(dir, server)
            .and_then(|socket| admin::watch(&socket, export, LIMIT))
            .with_context(|| format!("server '{server}' cannot be watched"))
    };
    Ok(servers.iter().map(watch).collect())
}

/// Whether a line only tells that a stream begins.
fn is_begin(line: &str) -> bool {
    matches!(serde_json::from_str(line), Ok(StreamLine::Begin { .. }))
}

/// An event for people: time, export, what happened, and the rest of it as it comes.
fn readable(line: &str) -> String {
    let Ok(serde_json::Value::Object(mut event)) = serde_json::from_str(line) else {
        return line.to_owned();
    };
    let mut text = |key| match event.remove(key) {
        Some(serde_json::Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    let (time, export, what) = (text("time_unix_ms"), text("export"), text("event"));
    event.remove("sequence");
    let time = match time.parse() {
        Ok(ms) => clock(ms),
        Err(_) => String::new(),
    };
    let mut words = vec![time, export, what];
    words.retain(|word| !word.is_empty());
    for (key, value) in event {
        match value {
            serde_json::Value::String(text) => words.push(format!("{key}=\"{text}\"")),
            other => words.push(format!("{key}={other}")),
        }
    }
    words.join(" ")
}

/// A time of day in UTC.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let [hours, minutes] = [seconds / 3600 % 24, seconds / 60 % 60];
    format!(
        "{hours:02}:{minutes:02}:{:02}.{:03}Z",
        seconds % 60,
        unix_ms % 1000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_a_line_for_people_whatever_is_in_it() {
        for (line, shown) in [
            (
                r#"{"sequence":7,"time_unix_ms":86399001,"export":"a","event":"client-refused","pid":3,"why":"x\ny"}"#,
                "23:59:59.001Z a client-refused pid=3 why=\"x\ny\"",
            ),
            (r#"{"event":"lost","count":3}"#, "lost count=3"),
            ("no json", "no json"),
        ] {
            assert_eq!(readable(line), shown);
        }
    }
}
