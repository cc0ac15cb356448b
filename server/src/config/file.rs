//! The configuration file: one `[[export]]` table for each export, `[defaults]` for all of them. Keys are those of
//! [`ExportOptions`] and `spec`.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use clap::FromArgMatches;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::export::ExportConfig;
use super::options::{ExportOptions, read_keys};
use super::spec::Spec;

/// The exports of a TOML file, whose keys have precedence over `options`. Relative paths in it are relative to the
/// folder it is in.
///
/// # Errors
///
/// When the file cannot be read or asks for what cannot be served; the message begins with file and line.
pub fn read_file(path: &Path, options: &ExportOptions) -> Result<Vec<ExportConfig>, ConfigError> {
    let in_file = |error| ConfigError::new(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(in_file)?;
    let absolute = std::path::absolute(path).map_err(in_file)?;
    let file = ConfigFile {
        name: path.display().to_string(),
        folder: absolute.parent().unwrap_or(Path::new("/")),
        text: &text,
    };
    file.exports(options)
}

struct ConfigFile<'a> {
    name: String,
    folder: &'a Path,
    text: &'a str,
}

impl ConfigFile<'_> {
    fn exports(&self, options: &ExportOptions) -> Result<Vec<ExportConfig>, ConfigError> {
        let document = DeTable::parse(self.text).map_err(|error| {
            let place = error.span().unwrap_or_default();
            self.refuse(&place, error.message().replace('\n', " "))
        })?;
        let mut defaults = options.clone();
        let mut exports: &[Spanned<DeValue<'_>>] = &[];
        for (key, value) in document.get_ref() {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("defaults", DeValue::Table(table)) => {
                    if let Some((key, _)) = table.get_key_value("name") {
                        let why = "name: [defaults] cannot name exports: name each [[export]]";
                        return Err(self.refuse(&key.span(), why));
                    }
                    self.read_table(table, "[defaults]: ", &mut defaults)?;
                }
                ("export", DeValue::Array(tables)) => exports = tables,
                (other, _) => {
                    let why = format!("{other}: unknown: there are [defaults] and [[export]]");
                    return Err(self.refuse(&key.span(), why));
                }
            }
        }
        if exports.is_empty() {
            return Err(ConfigError::new(format!(
                "{}: no [[export]] in it",
                self.name
            )));
        }
        let numbered = exports.iter().zip(1..);
        numbered
            .map(|(table, number)| self.export(table, number, &defaults))
            .collect()
    }

    fn export(
        &self,
        export: &Spanned<DeValue<'_>>,
        number: usize,
        defaults: &ExportOptions,
    ) -> Result<ExportConfig, ConfigError> {
        let place = export.span();
        let Some(table) = export.get_ref().as_table() else {
            return Err(self.refuse(&place, "export: write [[export]] above its keys"));
        };
        let Some(spec) = table.get("spec") else {
            let why = format!("export {number}: no spec, e.g. spec = \"file:/srv/disk.img\"");
            return Err(self.refuse(&place, why));
        };
        let text = spec.get_ref().as_str().unwrap_or_default();
        let parsed: Spec = text.parse().map_err(|error| {
            self.refuse(&spec.span(), format!("export {number}: spec: {error}"))
        })?;
        let name = table.get("name").and_then(|name| name.get_ref().as_str());
        let label = match parsed.name.as_deref().or(name) {
            Some(name) => format!("export '{name}': "),
            None => format!("export {number}: "),
        };
        let mut options = defaults.clone();
        self.read_table(table, &label, &mut options)?;
        ExportConfig::new(parsed, options, self.folder).map_err(|error| self.refuse(&place, error))
    }

    /// Reads the options in a table.
    fn read_table(
        &self,
        table: &DeTable<'_>,
        label: &str,
        options: &mut ExportOptions,
    ) -> Result<(), ConfigError> {
        let mut pairs = Vec::new();
        for (key, value) in table.iter().filter(|(key, _)| key.get_ref() != "spec") {
            let Some(value) = word(value.get_ref()) else {
                let why = format!(
                    "{label}{key}: give a text, a number, true or false",
                    key = key.get_ref()
                );
                return Err(self.refuse(&value.span(), why));
            };
            pairs.push((key.get_ref().as_ref(), value));
        }
        let words = pairs
            .iter()
            .map(|(key, value)| (*key, Some(value.as_ref())));
        let matches = read_keys::<ExportOptions>(words).map_err(|error| {
            let key = table.get_key_value(error.key());
            let place = key.map_or(0..0, |(key, _)| key.span());
            self.refuse(&place, format!("{label}{error}"))
        })?;
        let updated = options.update_from_arg_matches(&matches);
        updated.map_err(|error| ConfigError::new(error.to_string()))
    }

    fn refuse(&self, place: &Range<usize>, why: impl Display) -> ConfigError {
        let line = 1 + self.text[..place.start].matches('\n').count();
        ConfigError::new(format!("{}:{line}: {why}", self.name))
    }
}

/// A value as it would be written on the command line.
fn word<'a>(value: &'a DeValue<'_>) -> Option<Cow<'a, str>> {
    match value {
        DeValue::String(text) => Some(text.as_ref().into()),
        DeValue::Boolean(on) => Some(on.to_string().into()),
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
            Some(number.to_string().into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DoorMode;

    fn parse(text: &str, options: &ExportOptions) -> Result<Vec<ExportConfig>, String> {
        let file = ConfigFile {
            name: "f.toml".into(),
            folder: Path::new("/etc/ublkup"),
            text,
        };
        file.exports(options).map_err(|error| error.to_string())
    }

    #[test]
    fn a_file_gives_exports_with_defaults_under_them() {
        let exports = parse(
            r#"
            [defaults]
            queues = 2
            ublk = "no"
            [[export]]
            spec = "a=mem:1G"
            poll-us = 0x20
            [[export]]
            name = "b"
            spec = "null:1G,serial=B,depth=8"
            queues = 3
            read-only = true
            "#,
            &ExportOptions {
                depth: Some(32),
                ..ExportOptions::default()
            },
        )
        .unwrap();
        let [a, b] = &exports[..] else {
            panic!("{exports:?}")
        };
        assert_eq!((a.name.as_str(), a.queues, a.depth), ("a", 2, 32));
        assert_eq!((b.name.as_str(), b.queues, b.depth), ("b", 3, 8));
        assert!(!a.read_only && b.read_only);
        assert_eq!((b.ublk, b.serial.as_str()), (DoorMode::No, "B"));
        assert_eq!(a.threads.polling.to_string(), "32");
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let text = "[[export]]\nspec = 'file:a.img'\nvhost-socket = 'a.sock'";
        let export = &parse(text, &ExportOptions::default()).unwrap()[0];
        assert_eq!(export.storage.to_string(), "file:/etc/ublkup/a.img");
        let socket = export.vhost_socket.as_deref();
        assert_eq!(socket, Some(Path::new("/etc/ublkup/a.sock")));
    }

    #[test]
    fn a_bad_file_gets_one_line_with_line_key_and_what_is_allowed() {
        for (text, why) in [
            ("", "f.toml: no [[export]] in it"),
            (
                "\n[[export]]\nname = 'a'",
                "f.toml:2: export 1: no spec, e.g. spec = \"file:/srv/disk.img\"",
            ),
            (
                "[[export]]\nspec = 3",
                "f.toml:2: export 1: spec: '': no storage: write KIND:ARG with null:SIZE, mem:SIZE or file:PATH",
            ),
            (
                "[[export]]\nspec = 'mem:1G'\n[[export]]\nspec = 'mem:1X'",
                "f.toml:4: export 2: spec: 'mem:1X': '1X' is not a size: give a number of bytes, or one with K, M, G \
                 or T (powers of 1024)",
            ),
            (
                "[[export]]\nspec = 'a=mem:1G'\n\nqeues = 1",
                "f.toml:4: export 'a': qeues: unknown key; did you mean 'queues'?",
            ),
            (
                "[[export]]\nspec = 'mem:1G'\nname = 'b'\nqueues = -1",
                "f.toml:4: export 'b': queues: invalid value '-1': give a number from 1 to 64",
            ),
            (
                "[[export]]\nspec = 'mem:1G'\npoll-us = 'x'",
                "f.toml:3: export 1: poll-us: invalid value 'x': give a number of microseconds (0 to 1000000) or \
                 'always'",
            ),
            (
                "[[export]]\nspec = 'mem:1G'\nqueues = [1]",
                "f.toml:3: export 1: queues: give a text, a number, true or false",
            ),
            (
                "[[export]]\nspec = 'mem:1G'\n[[export]]\nspec = 'b=mem:1G'\nublk = 'no'\nvhost = 'no'",
                "f.toml:3: export 'b': ublk and vhost are both 'no': leave one of the doors on",
            ),
            (
                "[defaults]\nname = 'a'\n[[export]]\nspec = 'mem:1G'",
                "f.toml:2: name: [defaults] cannot name exports: name each [[export]]",
            ),
            (
                "[defaults]\nublk = 'maybe'",
                "f.toml:2: [defaults]: ublk: invalid value 'maybe': give one of auto, yes, no",
            ),
            (
                "exports = 3",
                "f.toml:1: exports: unknown: there are [defaults] and [[export]]",
            ),
            (
                "[export]\nspec = 'mem:1G'",
                "f.toml:1: export: unknown: there are [defaults] and [[export]]",
            ),
        ] {
            assert_eq!(parse(text, &ExportOptions::default()).unwrap_err(), why);
        }
        let error = parse("\n[[export]\n", &ExportOptions::default()).unwrap_err();
        assert!(
            error.starts_with("f.toml:2: ") && !error.contains('\n'),
            "{error}"
        );
    }
}
