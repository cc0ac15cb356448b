//! The configuration file: one `[[export]]` table for each export, `[defaults]` for all of them. Keys are those of
//! [`ExportOptions`] and `spec`.

use std::borrow::Cow;
use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::FromArgMatches;
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::ConfigError;
use super::export::{ExportConfig, Origin};
use super::options::{ExportOptions, read_keys};
use super::spec::Spec;

/// The main file of a configuration folder, and the folder of the others in it.
const MAIN: &str = "ublkup.toml";
const OTHERS: &str = "exports.d";

/// Whether there is a configuration in a folder.
#[must_use]
pub fn is_configured(folder: &Path) -> bool {
    is_there(&folder.join(MAIN)) || !others(folder).unwrap_or_default().is_empty()
}

/// The exports of a TOML file, or of a folder: those of its `ublkup.toml` and of `exports.d/*.toml`, in the order of
/// their names. Keys in files have precedence over `options`; `[defaults]` of `ublkup.toml` hold for the other files
/// too. Relative paths are relative to the folder of the file that they are in.
///
/// # Errors
///
/// When a file cannot be read or asks for what cannot be served; the message begins with file and line.
pub fn read_config(path: &Path, options: &ExportOptions) -> Result<Vec<ExportConfig>, ConfigError> {
    let mut exports = Vec::new();
    if path.is_dir() {
        let mut defaults = options.clone();
        let main = path.join(MAIN);
        // A link that leads nowhere, or a file that cannot be looked at, is an error and not an empty configuration.
        if is_there(&main) {
            (defaults, exports) = read_file(&main, options)?;
        }
        let unreadable =
            |error| ConfigError::new(format!("cannot read {}: {error}", path.display()));
        for file in others(path).map_err(unreadable)? {
            exports.extend(read_file(&file, &defaults)?.1);
        }
    } else {
        exports = read_file(path, options)?.1;
    }
    match exports.is_empty() {
        true => Err(ConfigError::new(format!(
            "{}: no [[export]] in it",
            path.display()
        ))),
        false => Ok(exports),
    }
}

/// Whether something has this name, whatever it is.
fn is_there(path: &Path) -> bool {
    !matches!(path.symlink_metadata(), Err(error) if error.kind() == std::io::ErrorKind::NotFound)
}

/// The files beside the main one, sorted.
fn others(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder.join(OTHERS)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut files = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    // No hidden ones: editors put their copies there.
    files.retain(|path| {
        let is_hidden = (path.file_name()).is_some_and(|name| name.as_encoded_bytes()[0] == b'.');
        path.extension() == Some("toml".as_ref()) && !is_hidden
    });
    files.sort();
    Ok(files)
}

/// The defaults and the exports of a file.
fn read_file(
    path: &Path,
    options: &ExportOptions,
) -> Result<(ExportOptions, Vec<ExportConfig>), ConfigError> {
    let in_file = |error| ConfigError::new(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path)
        .map_err(|error| ConfigError::new(format!("cannot read {}: {error}", path.display())))?;
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
    fn exports(
        &self,
        options: &ExportOptions,
    ) -> Result<(ExportOptions, Vec<ExportConfig>), ConfigError> {
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
        let numbered = exports.iter().zip(1..);
        let exports = numbered
            .map(|(table, number)| self.export(table, number, &defaults))
            .collect::<Result<_, _>>()?;
        Ok((defaults, exports))
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
        let mut export = ExportConfig::new(parsed, options, self.folder)
            .map_err(|error| self.refuse(&place, error))?;
        export.saved.origin = Origin::Config;
        Ok(export)
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
            let Some(value) = word(key.get_ref(), value.get_ref()) else {
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
            let key = table.get_key_value(error.key.as_str());
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

/// The value of a key as it would be written on the command line.
fn word<'a>(key: &str, value: &'a DeValue<'_>) -> Option<Cow<'a, str>> {
    match value {
        DeValue::String(text) => Some(text.as_ref().into()),
        DeValue::Boolean(on) => Some(on.to_string().into()),
        // 0o660 is 432, which would be another mode.
        DeValue::Integer(number) if number.radix() == 8 && key.ends_with("-mode") => {
            Some(format!("0o{}", number.as_str()).into())
        }
        DeValue::Integer(number) => {
            let number = i64::from_str_radix(number.as_str(), number.radix()).ok()?;
            Some(number.to_string().into())
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
