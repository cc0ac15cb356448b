//! `qemu-img`, which makes, reads and copies images.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// An image, as `qemu-img info` tells it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Info {
    pub filename: PathBuf,
    pub format: String,
    pub virtual_size: u64,
    #[serde(default)]
    pub actual_size: u64,
    /// As the image has it.
    #[serde(default)]
    pub backing_filename: Option<PathBuf>,
    #[serde(default)]
    pub full_backing_filename: Option<PathBuf>,
    #[serde(default)]
    pub backing_filename_format: Option<String>,
    #[serde(default)]
    format_specific: serde_json::Value,
}

impl Info {
    /// Whether the image names other files as they are seen from its own folder, or has its data in another one.
    pub fn is_bound_to_its_folder(&self) -> bool {
        let is_relative = |path: &PathBuf| path.is_relative();
        self.backing_filename.as_ref().is_some_and(is_relative)
    }

    /// The file with its data, if that is another one.
    pub fn data_file(&self) -> Option<&str> {
        self.format_specific["data"]["data-file"].as_str()
    }
}

/// What `qemu-img info` says of an image that may be in use, and of the files that it lies over if these are wanted: JSON.
pub(super) fn info_text(image: &Path, with_chain: bool) -> Result<String> {
    let mut command = qemu_img("info");
    command.args(["--force-share", "--output=json", "-f", "qcow2"]);
    if with_chain {
        command.arg("--backing-chain");
    }
    run(command.arg(image))
}

/// The files that an image lies over, and itself.
pub(super) fn chain(image: &Path) -> Result<Vec<Info>> {
    serde_json::from_str(&info_text(image, true)?).context("cannot read what qemu-img says")
}

/// The same, of the image alone.
pub(super) fn info(image: &Path) -> Result<Info> {
    let text = info_text(image, false)?;
    serde_json::from_str(&text).context("cannot read what qemu-img says")
}

/// Makes an image of a size, over a backing file that is not looked at.
pub(super) fn create(image: &Path, backing: &Path, size_bytes: u64) -> Result<()> {
    let mut command = qemu_img("create");
    command.args(["-q", "-f", "qcow2", "-F", "qcow2", "-u", "-b"]);
    run(command.arg(backing).arg(image).arg(size_bytes.to_string())).map(drop)
}

/// Copies an image that is written to no more into a new file, with its progress on a terminal.
pub(super) fn convert(image: &Path, copy: &Path, format: &str, progress: bool) -> Result<()> {
    let mut command = qemu_img("convert");
    command.args(["-f", "qcow2", "-O", format]);
    if progress {
        command.arg("-p").stdout(Stdio::inherit());
    }
    run(command.arg(image).arg(copy)).map(drop)
}

fn qemu_img(what: &str) -> Command {
    let mut command = Command::new("qemu-img");
    command.arg(what).stdin(Stdio::null());
    command
}

/// Runs it; what it printed.
fn run(command: &mut Command) -> Result<String> {
    let child = command.stderr(Stdio::piped());
    let output = match child.output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!(
                "qemu-img is not installed: Debian and Ubuntu have it in qemu-utils, Fedora in qemu-img"
            )
        }
        other => other.context("cannot run qemu-img")?,
    };
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("{}", said.trim());
    }
    String::from_utf8(output.stdout).context("cannot read what qemu-img says")
}
