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
    Answer, Connection, DiskClaim, Error, Lookup, Name, client_runtime_dirs, connect,
};

use super::cli::NOT_UPGRADABLE;
use super::output::{print_json, print_line};
use crate::export::upgrade::SERVICE;
use crate::request::format_size;

/// How long a server may take to turn away a client that comes second.
const TURNED_AWAY_WITHIN: Duration = Duration::from_millis(100);

/// Result of a probe, as its JSON has it.
#[derive(Debug, Serialize)]
struct Finding {
    device: String,
    upgradable: bool,
    #[serde(flatten)]
    service: Service,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Service {
    Usable {
        way: &'static str,
        server_pid: i32,
        size_bytes: u64,
        read_only: bool,
    },
    Unusable {
        why_not: String,
    },
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

/// Where services are searched: in `runtime_dir` first.
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
/// When the device cannot be examined.
pub fn run(device: &Path, runtime_dir: Option<&Path>, json: bool) -> Result<ExitCode> {
    let finding = Finding::of(device, examine(device, &lookup(runtime_dir))?);
    match json {
        true => print_json(&finding)?,
        false => print_line(&finding.sentence())?,
    }
    Ok(match finding.upgradable {
        true => ExitCode::SUCCESS,
        false => NOT_UPGRADABLE.into(),
    })
}

fn examine(device: &Path, lookup: &Lookup) -> Result<Service> {
    let no = |why_not| Service::Unusable { why_not };
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
        Found::Service(connection) => Service::Usable {
            way: connection.route().name(),
            server_pid: connection.peer().pid,
            size_bytes,
            read_only,
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
    let connection = match connect(disk, &Name::new(SERVICE)?, lookup)? {
        Answer::Found(connection) => connection,
        Answer::NoService(why) => return Ok(Found::Nothing(why.to_string())),
    };
    // A vhost-user server speaks when spoken to: until then it can only hang up.
    let mut fds = [PollFd::new(&connection, PollFlags::IN | PollFlags::RDHUP)];
    let limit = TURNED_AWAY_WITHIN.try_into().ok();
    match poll(&mut fds, limit.as_ref()) {
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
    fn of(device: &Path, service: Service) -> Self {
        Self {
            device: device.display().to_string(),
            upgradable: matches!(service, Service::Usable { .. }),
            service,
        }
    }

    fn sentence(&self) -> String {
        let device = &self.device;
        match &self.service {
            Service::Usable {
                way,
                server_pid,
                size_bytes,
                read_only,
            } => {
                let size = format_size(*size_bytes);
                let access = if *read_only { "read-only" } else { "writable" };
                format!(
                    "{device}: upgradable by the {way} route; server process {server_pid}, {size}, {access}"
                )
            }
            Service::Unusable { why_not } => format!("{device}: not upgradable: {why_not}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_not_upgradable_and_a_missing_device_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let finding = Finding::of(file.path(), examine(file.path(), &lookup(None)).unwrap());
        assert!(!finding.upgradable);
        assert!(finding.sentence().ends_with("not a block device"));
        assert!(examine(Path::new("/dev/no-such-disk"), &lookup(None)).is_err());
    }

    #[test]
    fn a_finding_tells_route_process_size_and_access() {
        let service = Service::Usable {
            way: "kernel",
            server_pid: 42,
            size_bytes: 1 << 30,
            read_only: true,
        };
        let finding = Finding::of(Path::new("/dev/ublkb0"), service);
        assert_eq!(
            finding.sentence(),
            "/dev/ublkb0: upgradable by the kernel route; server process 42, 1G, read-only"
        );
        let json = serde_json::to_string(&finding).unwrap();
        assert_eq!(
            json,
            r#"{"device":"/dev/ublkb0","upgradable":true,"way":"kernel","server_pid":42,"size_bytes":1073741824,"read_only":true}"#
        );
    }
}
