//! The limit on open files, `RLIMIT_NOFILE`.

use std::io;

use rustix::process::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of this process to its hard limit. An export takes a handful of descriptors,
/// each of its clients some more, and the usual soft limit of 1024 was made for select(2).
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    let soft = limit.current;
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit on open files above {soft:?}");
    }
}

/// An error's text, with the limit and how to raise it if that was reached.
#[must_use]
pub fn explain(error: &io::Error) -> String {
    match is_limit(error) {
        true => format!("{error}: {}", limit()),
        false => error.to_string(),
    }
}

/// Adds the limit and how to raise it, if that was reached.
#[must_use]
pub fn name_limit(error: anyhow::Error) -> anyhow::Error {
    let causes = error.chain().filter_map(|cause| cause.downcast_ref());
    match causes.into_iter().any(is_limit) {
        true => error.context(limit()),
        false => error,
    }
}

fn is_limit(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMFILE)
}

fn limit() -> String {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    format!("the limit is {limit} open files (ulimit -Hn, LimitNOFILE=)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        raise_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }

    #[test]
    fn only_the_error_about_the_limit_names_it() {
        let of = |errno| explain(&io::Error::from_raw_os_error(errno));
        assert!(of(libc::EMFILE).contains("LimitNOFILE="));
        assert!(!of(libc::ENFILE).contains("LimitNOFILE="));
        let within = |errno| {
            let error = anyhow::Error::from(io::Error::from_raw_os_error(errno));
            format!("{:#}", name_limit(error.context("cannot listen")))
        };
        assert!(
            within(libc::EMFILE).contains("open files"),
            "{}",
            within(libc::EMFILE)
        );
        assert!(within(libc::ENFILE).starts_with("cannot listen"));
    }
}
