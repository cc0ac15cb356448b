//! How a queue thread ended.

use std::any::Any;
use std::fmt;
use std::io;

/// How a queue thread ended.
#[derive(Debug)]
pub enum End {
    /// Its door was closed, and everything is answered.
    Finished,
    /// Its ring is broken.
    Failed(io::Error),
    /// A bug: this is what the panic said.
    Panicked(String),
}

impl End {
    /// The end of a thread whose loop returned, or panicked, with this.
    pub(super) fn of(result: Result<io::Result<()>, Box<dyn Any + Send>>) -> Self {
        match result {
            Ok(Ok(())) => Self::Finished,
            Ok(Err(error)) => Self::Failed(error),
            Err(panic) => Self::panicked(&*panic),
        }
    }

    /// The end of a thread that panicked with this.
    pub(super) fn panicked(panic: &(dyn Any + Send)) -> Self {
        Self::Panicked(panic_message(panic).to_owned())
    }
}

/// What a panic said.
pub(super) fn panic_message(panic: &(dyn Any + Send)) -> &str {
    (panic.downcast_ref::<&str>().copied())
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("a panic without a message")
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::Failed(error) => write!(f, "{error}"),
            Self::Panicked(message) => write!(f, "its thread panicked: {message}"),
        }
    }
}
