//! The log, which holds up no thread: lines go to a thread of their own that writes them to standard error.
//!
//! What is at the other end of standard error is not ours: a file system that is full, a pipe whose reader has
//! died or does not read. Lines that cannot be written are dropped and counted, and nothing else changes.
//!
//! The journal gets each line with its priority in front, `<4>` for a warning (sd-daemon(3)), and without a time, as it
//! has a clock of its own.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::fstat;
use tracing::field::Field;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{self, FormatEvent, FormatFields, Writer, debug_fn};
use tracing_subscriber::registry::LookupSpan;
use upgrade_proto::printable;

use super::wait::repeat_while;

/// Lines that may wait to be written.
const WAITING_LINES: usize = 4096;

/// How long the last lines may take.
const END_LIMIT: Duration = Duration::from_secs(1);

const END_INTERVAL: Duration = Duration::from_millis(1);

/// How lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// An object for each line
    Json,
}

type ChangeFilter = dyn Fn(EnvFilter) -> Result<(), String> + Send + Sync;

/// Changes the filter of the log of this process.
static CHANGE_FILTER: OnceLock<Box<ChangeFilter>> = OnceLock::new();

static LOST: AtomicUsize = AtomicUsize::new(0);

/// Lines on their way to the thread that writes them.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// Lines that could not be written.
#[must_use]
pub fn lost_lines() -> usize {
    LOST.load(Ordering::Relaxed)
}

/// Waits until all lines are written, for a second at most.
pub fn wait_until_written() {
    let waiting = || WAITING.load(Ordering::Relaxed);
    repeat_while(END_LIMIT, END_INTERVAL, waiting, |waiting| *waiting > 0);
}

/// Makes a log that of the process. Each format is a type of its own, so this is no function.
macro_rules! init {
    ($log:expr) => {{
        let log = $log.with_filter_reloading();
        let handle = log.reload_handle();
        let change = move |filter| handle.reload(filter).map_err(|error| error.to_string());
        // There is one log.
        let _ = CHANGE_FILTER.set(Box::new(change));
        log.init();
    }};
}

/// Starts the log. Its last lines are written when the result is dropped, for a second at most.
///
/// # Errors
///
/// When no thread can be started.
pub fn start(filter: &str, log_format: LogFormat) -> io::Result<Log> {
    let (sender, receiver) = sync_channel(WAITING_LINES);
    let thread = std::thread::Builder::new()
        .name("log".into())
        .spawn(move || write_lines(&receiver))?;
    let lines = Lines(sender.clone());
    let log = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(filter))
        .with_writer(move || lines.clone())
        .with_ansi(io::stderr().is_terminal());
    let text = format::format().with_target(false);
    let json = format::json().flatten_event(true).with_target(false);
    match (log_format, is_journal()) {
        (LogFormat::Text, false) => init!(log.fmt_fields(fields()).event_format(text)),
        (LogFormat::Text, true) => {
            let text = text.without_time().with_level(false);
            init!(log.fmt_fields(fields()).event_format(Prioritized(text)));
        }
        (LogFormat::Json, false) => init!(log.json().event_format(json)),
        (LogFormat::Json, true) => {
            let json = Prioritized(json.without_time());
            init!(log.json().event_format(json));
        }
    }
    Ok(Log { sender, thread })
}

/// Checks a filter of the log. `EnvFilter` takes any word for a module, and a misspelt level switched the log off.
///
/// # Errors
///
/// What may be given.
pub fn check_filter(text: &str) -> Result<String, String> {
    let levels = ["error", "warn", "info", "debug", "trace", "off"];
    let is_good = |directive: &str| {
        let level = directive.rsplit('=').next().unwrap_or(directive);
        levels.contains(&level.trim().to_ascii_lowercase().as_str())
    };
    match text.split(',').all(is_good) && EnvFilter::try_new(text).is_ok() {
        true => Ok(text.to_owned()),
        false => Err(format!(
            "give one of {}, or MODULE=LEVEL",
            levels.join(", ")
        )),
    }
}

/// Changes what is logged from now on.
///
/// # Errors
///
/// What may be given, or that there is no log.
pub fn set_filter(text: &str) -> Result<(), String> {
    let filter = EnvFilter::new(check_filter(text)?);
    let change = CHANGE_FILTER.get().ok_or("this process has no log")?;
    change(filter)
}

/// Whether standard error is a stream to the journal (systemd.exec(5), `JOURNAL_STREAM`).
#[must_use]
pub fn is_journal() -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(io::stderr()).is_ok_and(|stream| told == format!("{}:{}", stream.st_dev, stream.st_ino))
}

/// The priority of a line, as the journal reads it at its beginning.
#[must_use]
pub fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// Lines of another format behind their priority.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut line: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        line.write_str(priority(*event.metadata().level()))?;
        self.0.format_event(context, line, event)
    }
}

/// The log of this process.
#[derive(Debug)]
pub struct Log {
    sender: SyncSender<Option<Vec<u8>>>,
    thread: JoinHandle<()>,
}

impl Drop for Log {
    fn drop(&mut self) {
        let full = |sent: &Result<(), _>| matches!(sent, Err(TrySendError::Full(_)));
        let _late = repeat_while(END_LIMIT, END_INTERVAL, || self.sender.try_send(None), full);
        let is_finished = || self.thread.is_finished();
        repeat_while(END_LIMIT, END_INTERVAL, is_finished, |finished| !finished);
    }
}

/// How the fields of a line are written.
fn fields() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    debug_fn(write_field).delimited(" ")
}

/// A field of a line, the message among them. What clients, files and processes are called is the choice of others.
fn write_field(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    let text = printable(&format!("{value:?}"));
    match field.name() {
        "message" => writer.write_str(&text),
        name => write!(writer, "{name}={text}"),
    }
}

/// Writes lines until there is `None`.
fn write_lines(lines: &Receiver<Option<Vec<u8>>>) {
    while let Ok(Some(line)) = lines.recv() {
        if io::stderr().write_all(&line).is_err() {
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        WAITING.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Takes lines, one with each write.
#[derive(Clone)]
struct Lines(SyncSender<Option<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        WAITING.fetch_add(1, Ordering::Relaxed);
        if self.0.try_send(Some(line.to_vec())).is_err() {
            WAITING.fetch_sub(1, Ordering::Relaxed);
            LOST.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_have_named_forges_no_line() {
        let (sender, lines) = sync_channel(10);
        let writer = Lines(sender);
        let log = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .with_ansi(false)
            .with_target(false)
            .without_time()
            .fmt_fields(fields())
            .finish();
        let name = "x\n ERROR a forged line\u{1b}[2J\u{9b}2J";
        tracing::subscriber::with_default(log, || {
            tracing::info!("{name}: said");
            tracing::warn!(path = %name, export = name, count = 2, "cannot remove");
        });
        let line = || String::from_utf8(lines.recv().unwrap().unwrap()).unwrap();
        let shown = r"x\n ERROR a forged line\u{1b}[2J\u{9b}2J";
        assert_eq!(line(), format!(" INFO {shown}: said\n"));
        assert_eq!(
            line(),
            format!(" WARN cannot remove path={shown} export=\"{shown}\" count=2\n")
        );
    }
}
