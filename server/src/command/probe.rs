//! `ublkup probe`: whether a block device leads to a vhost-user-blk service. It claims the device for the time of
//! an open(2).

use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use serde::Serialize;
use upgrade_proto::{
    Answer, Connection, DiskClaim, Error, Lookup, Name, client_runtime_dirs, connect_to_disk,
};

use super::cli::NOT_UPGRADABLE;
use super::output::print;
use crate::export::upgrade::SERVICE;
use crate::request::format_size;

/// How long a server may take to turn away a client that comes second.
const TURNED_AWAY_WITHIN: Duration = Duration::from_millis(100);

/// Result of a probe, as its JSON has it.
#[derive(Debug, Serialize)]
struct Finding {
    device: String,
    upgradable: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why_not: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    way: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    server_pid: Option<i32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    read_only: Option<bool>,
}

/// Result of looking for the service of a disk.
#[derive(Debug)]
pub enum Found {
    /// A connection; the server has not hung up on it.
    Service(Connection),
    /// The service cannot be had, and the disk may be used as a block device.
    Nothing(String),
    /// Another client has the disk: it cannot be written as a block device either.
    Taken,
}

/// Where to look for services: in `runtime_dir` first.
#[must_use]
pub fn lookup(runtime_dir: Option<&Path>) -> Lookup {
    let mut runtime_dirs: Vec<_> = runtime_dir.map(Path::to_owned).into_iter().collect();
    runtime_dirs.extend(client_runtime_dirs());
    Lookup {
        runtime_dirs,
        ..Lookup::default()
    }
}

/// `ublkup probe`
///
/// # Errors
///
/// When the device cannot be looked at.
pub fn run(device: &Path, runtime_dir: Option<&Path>, json: bool) -> Result<ExitCode> {
    let finding = look(device, &lookup(runtime_dir))?;
    let text = if json {
        serde_json::to_string_pretty(&finding)?
    } else {
        finding.sentence()
    };
    print(&format!("{text}\n"))?;
    Ok(match finding.upgradable {
        true => ExitCode::SUCCESS,
        false => NOT_UPGRADABLE.into(),
    })
}

fn look(device: &Path, lookup: &Lookup) -> Result<Finding> {
    let no = |why: String| Finding {
        device: device.display().to_string(),
        upgradable: false,
        why_not: Some(why),
        way: None,
        server_pid: None,
        size_bytes: None,
        read_only: None,
    };
    // The claim shows whether an upgrade would get the disk, and is given up at once: a program that wants it
    // meanwhile, mount(8) say, must not be refused because of a probe.
    let claim = match DiskClaim::open(device) {
        Ok(claim) => claim,
        Err(error) => return not_openable(error).map(no),
    };
    let read_only = claim.is_read_only();
    let disk = claim.give_up()?;
    let size_bytes = size_bytes(&disk).with_context(|| device.display().to_string())?;
    Ok(match service(&disk, lookup)? {
        Found::Service(connection) => Finding {
            device: device.display().to_string(),
            upgradable: true,
            why_not: None,
            way: Some(connection.route().name()),
            server_pid: Some(connection.peer().pid),
            size_bytes: Some(size_bytes),
            read_only: Some(read_only),
        },
        Found::Nothing(why) => no(why),
        Found::Taken => no("another client has the disk".into()),
    })
}

/// The reasons for "no" among the errors of opening; the others are errors.
fn not_openable(error: Error) -> Result<String> {
    match (&error, error.errno()) {
        (Error::Claimed { cause, .. }, _) => Ok(format!("in use: {cause}")),
        (_, Errno::NOTBLK) => Ok("not a block device".into()),
        (_, Errno::ACCESS | Errno::PERM | Errno::ROFS) => Ok(format!(
            "{error}: a disk that can be written needs a descriptor that can write"
        )),
        _ => Err(error.into()),
    }
}

/// Connects to the service of a disk and sees whether the server keeps the connection.
///
/// # Errors
///
/// When the kernel or the registry cannot be asked.
pub fn service(disk: impl AsFd, lookup: &Lookup) -> Result<Found> {
    let connection = match connect_to_disk(disk, &Name::new(SERVICE)?, lookup)? {
        Answer::Found(connection) => connection,
        Answer::NoService(why) => return Ok(Found::Nothing(why.to_string())),
    };
    // A vhost-user server speaks when spoken to: until then it can only hang up.
    let mut fds = [PollFd::new(&connection, PollFlags::IN | PollFlags::RDHUP)];
    let patience = TURNED_AWAY_WITHIN.try_into().ok();
    match poll(&mut fds, patience.as_ref()) {
        Ok(0) | Err(Errno::INTR) => Ok(Found::Service(connection)),
        Ok(_) => Ok(Found::Taken),
        Err(error) => Err(error.into()),
    }
}

fn size_bytes(disk: impl AsFd) -> Result<u64> {
    let fd = disk.as_fd().try_clone_to_owned()?;
    Ok(std::fs::File::from(fd).seek(SeekFrom::End(0))?)
}

impl Finding {
    fn sentence(&self) -> String {
        let device = &self.device;
        match (self.way, &self.why_not) {
            (Some(way), _) => format!(
                "{device}: upgradable by the {way}'s way; server process {}, {}, {}",
                self.server_pid.unwrap_or_default(),
                format_size(self.size_bytes.unwrap_or_default()),
                match self.read_only {
                    Some(true) => "read-only",
                    _ => "writable",
                }
            ),
            (None, why) => format!(
                "{device}: not upgradable: {}",
                why.as_deref().unwrap_or("no server offers it")
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_not_upgradable_and_a_missing_device_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let finding = look(file.path(), &lookup(None)).unwrap();
        assert!(!finding.upgradable);
        assert!(finding.sentence().ends_with("not a block device"));
        assert!(look(Path::new("/dev/no-such-disk"), &lookup(None)).is_err());
    }

    #[test]
    fn a_finding_tells_way_process_size_and_access() {
        let finding = Finding {
            device: "/dev/ublkb0".into(),
            upgradable: true,
            why_not: None,
            way: Some("kernel"),
            server_pid: Some(42),
            size_bytes: Some(1 << 30),
            read_only: Some(true),
        };
        assert_eq!(
            finding.sentence(),
            "/dev/ublkb0: upgradable by the kernel's way; server process 42, 1G, read-only"
        );
        let json = serde_json::to_value(&finding).unwrap();
        assert_eq!(json["way"], "kernel");
        assert!(json.get("why_not").is_none());
    }
}
