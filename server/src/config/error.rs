//! Why a configuration is refused.

/// Why exports cannot be served as asked: one line, with the place in the file or the SPEC, the key, and what is
/// allowed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ConfigError {
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}
