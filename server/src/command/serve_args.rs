//! The options of `serve` and `add`: from the command line to exports.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use clap_complete::ArgValueCandidates;

use super::metrics::Address;
use super::names::server_names;
use crate::config::{
    ConfigError, ExportConfig, ExportOptions, check_name, check_together, is_configured,
    read_config,
};
use crate::export::{Configuration, Predecessor};

/// What is served where nothing else is asked for.
pub(super) const CONFIG_FOLDER: &str = "/etc/ublkup";

/// Most exports that can be added to a server.
const MAX_ROOM: i64 = 100_000;

/// `serve`
#[derive(Debug, Args)]
pub struct Serve {
    /// [NAME=]KIND:ARG[,key=value…]; KIND:ARG is null:SIZE, mem:SIZE, file:PATH, rbd:POOL/IMAGE, vhost-user:SOCKET, qcow2:PATH,
    /// qemu:KEY=VALUE,…, or just the path of a file; keys are the export options below, for files cache=auto|direct|buffered and format=raw,
    /// and for images of Ceph conf=FILE and user=NAME
    #[arg(value_name = "SPEC")]
    pub specs: Vec<String>,

    /// What is done about earlier servers.
    #[command(flatten)]
    pub predecessor: PredecessorOptions,

    /// Whether the server confines itself.
    #[command(flatten)]
    pub sandbox: SandboxOption,

    /// If some of several exports cannot start, serve the others [default: serve none]
    #[arg(long)]
    pub keep_going: bool,

    /// Call the server this in commands that concern all of its exports [default: its process number]
    #[arg(long, value_name = "NAME", value_parser = export_name)]
    pub server_name: Option<String>,

    /// Let Prometheus collect measurements here (GET /metrics): a loopback address like 127.0.0.1:9177, or the path of
    /// a socket [default: nowhere]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<Address>,

    /// Make room for this many exports that are added while the server runs; one that ends makes room again [default: 64]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=MAX_ROOM))]
    pub room: Option<u32>,

    /// Serve the `[[export]]` tables of a TOML file, beside the SPECs; of a folder: those of its ublkup.toml and of
    /// exports.d/*.toml [default: without a SPEC /etc/ublkup, if there are exports in it]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Serve for as long as this shell command runs, and end with its exit code. It finds $UBLKUP_DEVICE and
    /// $UBLKUP_SOCKET in its environment, if there is one export
    #[arg(long, value_name = "CMD")]
    pub run: Option<OsString>,

    /// Options of the exports.
    #[command(
        flatten,
        next_help_heading = "Export options, also keys of a SPEC and of a configuration file"
    )]
    pub options: ExportOptions,
}

/// `add`
#[derive(Debug, Args)]
pub struct Add {
    /// [NAME=]KIND:ARG[,key=value…], as for serve
    #[arg(value_name = "SPEC", required = true)]
    pub specs: Vec<String>,

    /// The server, by name [default: the only one that runs]
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(server_names))]
    pub server: Option<String>,

    /// Print JSON, as stat does, an object for each export
    #[arg(long)]
    pub json: bool,

    /// Options of the exports.
    #[command(flatten, next_help_heading = "Export options, also keys of a SPEC")]
    pub options: ExportOptions,
}

/// Whether a server confines itself.
#[derive(Clone, Copy, Debug, Args)]
pub struct SandboxOption {
    /// Give up what the server does not need once its exports are open, so that a guest that takes it over reaches
    /// their images, sockets and notes and little else [default: yes]
    #[arg(long, value_name = "yes|no", num_args = 0..=1, require_equals = true,
        default_missing_value = "yes", value_parser = crate::config::switch)]
    sandbox: Option<bool>,
}

impl SandboxOption {
    /// Whether it does.
    #[must_use]
    pub fn is_on(self) -> bool {
        self.sandbox.unwrap_or(true)
    }
}

/// What a new server does about an earlier one of the same name.
#[derive(Clone, Copy, Debug, Args)]
pub struct PredecessorOptions {
    /// If a living server has the export, take over its block device and its clients, which see a pause and no
    /// errors [default: refuse to start]
    #[arg(long)]
    pub take_over: bool,

    /// If a dead server left a block device that waits, remove it and make a new one: requests that wait fail, and
    /// a file system on it loses what it had not written [default: recover the device, or refuse to start]
    #[arg(long, conflicts_with = "take_over")]
    pub replace: bool,
}

impl From<PredecessorOptions> for Predecessor {
    fn from(options: PredecessorOptions) -> Self {
        match options {
            PredecessorOptions {
                take_over: true, ..
            } => Self::TakeOver,
            PredecessorOptions { replace: true, .. } => Self::Replace,
            _ => Self::Dead,
        }
    }
}

/// Checks the name of an export or of a server.
pub(super) fn export_name(text: &str) -> Result<String, ConfigError> {
    check_name(text).map(|()| text.to_owned())
}

impl Serve {
    /// The exports that were asked for, validated alone and together.
    ///
    /// # Errors
    ///
    /// When something cannot be served as asked.
    pub fn exports(&self) -> Result<Vec<ExportConfig>, ConfigError> {
        let mut exports = exports_of(&self.specs, &self.options, self.config.is_none())?;
        match self.config_path() {
            Some(path) => exports.extend(read_config(path, &self.options)?),
            None if !exports.is_empty() => {}
            None => {
                return Err(ConfigError::new(format!(
                    "nothing to serve: give a SPEC like file:/srv/disk.img, or --config FILE; there is no \
                     {CONFIG_FOLDER}/ublkup.toml and no {CONFIG_FOLDER}/exports.d/*.toml"
                )));
            }
        }
        check_together(&exports)?;
        Ok(exports)
    }

    /// The configuration file or folder.
    fn config_path(&self) -> Option<&Path> {
        let default = || {
            let is_used = self.specs.is_empty() && is_configured(CONFIG_FOLDER.as_ref());
            is_used.then_some(CONFIG_FOLDER.as_ref())
        };
        self.config.as_deref().or_else(default)
    }

    /// Where exports come from that are not on the command line.
    #[must_use]
    pub fn configuration(&self) -> Option<Configuration> {
        Some(Configuration {
            path: std::path::absolute(self.config_path()?).ok()?,
            options: self.options.clone(),
        })
    }
}

impl Add {
    /// The exports that are to be added, validated alone and together.
    ///
    /// # Errors
    ///
    /// When something cannot be served as asked.
    pub fn exports(&self) -> Result<Vec<ExportConfig>, ConfigError> {
        let exports = exports_of(&self.specs, &self.options, true)?;
        check_together(&exports)?;
        Ok(exports)
    }
}

/// The exports of SPECs, of which there may be others beside them.
fn exports_of(
    specs: &[String],
    options: &ExportOptions,
    are_all: bool,
) -> Result<Vec<ExportConfig>, ConfigError> {
    if let Some(flag) = options.unshareable().next()
        && !(are_all && specs.len() == 1)
    {
        return Err(ConfigError::new(format!(
            "{flag} is for one export, and there are several: say it in each SPEC or in a --config file"
        )));
    }
    let folder = std::env::current_dir()
        .map_err(|error| ConfigError::new(format!("no working directory: {error}")))?;
    let export = |spec: &String| ExportConfig::new(spec.parse()?, options.clone(), &folder);
    specs.iter().map(export).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::command::cli::{Cli, Command};

    fn exports(args: &[&str]) -> Result<Vec<ExportConfig>, String> {
        let args = ["ublkup", "serve"].iter().chain(args);
        let cli = Cli::try_parse_from(args).map_err(|error| error.to_string())?;
        let Command::Serve(serve) = cli.command else {
            unreachable!("parsed 'serve'")
        };
        serve.exports().map_err(|error| error.to_string())
    }

    #[test]
    fn several_specs_share_the_options_that_can_be_shared() {
        let got = exports(&["--read-only", "--queues", "2", "a=mem:1G", "b=null:2G"]).unwrap();
        assert!(
            got.iter()
                .all(|export| export.read_only && export.queues == 2)
        );
        for option in ["--name", "--ublk-id", "--serial", "--vhost-socket"] {
            let error = exports(&[option, "1", "a=mem:1G", "b=mem:1G"]).unwrap_err();
            assert!(
                error.contains(option) && error.contains("one export"),
                "{error}"
            );
            assert!(exports(&[option, "1", "mem:1G"]).is_ok());
        }
        assert!(
            exports(&["mem:1G", "mem:1G"])
                .unwrap_err()
                .contains("two exports")
        );
        assert!(exports(&[]).is_err());
    }
}
