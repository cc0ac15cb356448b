//! Errors as users read them.

/// An error and its causes on one line, each text once: several error types have their cause in their own text.
#[must_use]
pub fn explain(error: &anyhow::Error) -> String {
    let mut line = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !line.contains(&cause) {
            line.push_str(": ");
            line.push_str(&cause);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open x: {source}; look for it")]
        struct Open {
            source: std::io::Error,
        }
        let source = std::io::Error::from_raw_os_error(2);
        let opened: Result<(), _> = Err(Open { source });
        let error = opened.context("a").unwrap_err();
        assert_eq!(
            explain(&error),
            "a: cannot open x: No such file or directory (os error 2); look for it"
        );
        let error = anyhow::anyhow!("inner").context("outer");
        assert_eq!(explain(&error), "outer: inner");
    }
}
