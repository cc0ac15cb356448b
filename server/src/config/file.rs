//! The configuration file: one `[[export]]` table per export, `[defaults]` for all of them.

use std::path::Path;

use serde::Deserialize;

use super::{ConfigError, ExportConfig, ExportOptions, Spec};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigFile {
    #[serde(default)]
    defaults: ExportOptions,
    #[serde(default)]
    export: Vec<toml::Table>,
}

/// The exports of a TOML file; `defaults` are the command line's, which the file overrides.
///
/// # Errors
///
/// When the file cannot be read or says what cannot be served; the message names the file.
pub fn read_file(path: &Path, defaults: &ExportOptions) -> Result<Vec<ExportConfig>, ConfigError> {
    let in_file = |why: String| ConfigError(format!("{}: {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| in_file(error.to_string()))?;
    parse(&text, defaults).map_err(in_file)
}

fn parse(text: &str, defaults: &ExportOptions) -> Result<Vec<ExportConfig>, String> {
    // toml's messages show the line over several lines; people get one.
    let one_line = |error: toml::de::Error| {
        let line = error
            .span()
            .map(|span| text[..span.start].lines().count().max(1))
            .map(|line| format!("line {line}: "))
            .unwrap_or_default();
        format!("{line}{}", error.message().replace('\n', " "))
    };
    let file: ConfigFile = toml::from_str(text).map_err(one_line)?;
    if file.export.is_empty() {
        return Err("no [[export]] in it".into());
    }
    if file.defaults.name.is_some() {
        return Err("[defaults] cannot name exports".into());
    }
    let defaults = file.defaults.or(defaults);
    file.export
        .into_iter()
        .enumerate()
        .map(|(index, table)| {
            export(table, &defaults).map_err(|why| format!("export {}: {why}", index + 1))
        })
        .collect()
}

fn export(mut table: toml::Table, defaults: &ExportOptions) -> Result<ExportConfig, String> {
    let spec: Spec = match table.remove("spec") {
        Some(toml::Value::String(text)) => text.parse().map_err(|e: ConfigError| e.0)?,
        Some(_) => return Err("spec is not a string".into()),
        None => return Err("no spec, e.g. spec = \"file:/srv/disk.img\"".into()),
    };
    let options: ExportOptions = table
        .try_into()
        .map_err(|error: toml::de::Error| error.message().replace('\n', " "))?;
    options.or(defaults).export(spec).map_err(|error| error.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DoorMode;

    #[test]
    fn a_file_gives_exports_with_defaults_under_them() {
        let exports = parse(
            r#"
            [defaults]
            queues = 2
            ublk = "no"
            [[export]]
            spec = "a=mem:1G"
            [[export]]
            name = "b"
            spec = "null:1G,serial=B"
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
        assert_eq!((b.name.as_str(), b.queues, b.depth), ("b", 3, 32));
        assert!(!a.read_only && b.read_only);
        assert_eq!(b.ublk, DoorMode::No);
    }

    #[test]
    fn a_bad_file_gets_one_line_that_says_where() {
        for (text, why) in [
            ("", "no [[export]]"),
            ("[[export]]\nname = 'a'", "export 1: no spec"),
            ("[[export]]\nspec = 3", "export 1: spec is not a string"),
            (
                "[[export]]\nspec = 'mem:1G'\nqeues = 1",
                "unknown field `qeues`",
            ),
            ("[[export]]\nspec = 'mem:1G'\nqueues = -1", "export 1"),
            (
                "[defaults]\nname = 'a'\n[[export]]\nspec = 'mem:1G'",
                "cannot name",
            ),
            ("[[export]\n", "line 1"),
            ("exports = 3", "unknown field `exports`"),
        ] {
            let error = parse(text, &ExportOptions::default()).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
