//! `[NAME=]KIND:ARG[,key=value…]`, or a path in the place of `KIND:ARG`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{ArgMatches, Args, Command};

use super::commas;
use super::error::ConfigError;
use super::name::check_name;
use super::options::{ExportOptions, read_keys};
use crate::request::{MAX_DISK_BYTES, SECTOR_BYTES, format_size, parse_size};
#[cfg(feature = "testing")]
use crate::storage::Rule;
use crate::storage::{CacheMode, ImageFormat, ImageName, QemuDisk};

/// Where the data of an export lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageSpec {
    /// `null:SIZE`: completes everything, stores nothing.
    Null {
        /// Size of the disk.
        size_bytes: u64,
    },
    /// `mem:SIZE`: in memory, sparse, gone with the process.
    Memory {
        /// Size of the disk.
        size_bytes: u64,
    },
    /// `file:PATH`: a regular file or a block device.
    File {
        /// The file.
        path: PathBuf,
        /// How the page cache is used.
        cache: CacheMode,
        /// What the file holds, if that is said.
        format: Option<ImageFormat>,
    },
    /// `rbd:POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]`: an image of a Ceph cluster.
    Rbd(ImageName),
    /// `vhost-user:SOCKET`: the disk of another vhost-user-blk server.
    VhostUser {
        /// The server's socket.
        socket: PathBuf,
    },
    /// `qcow2:PATH` and `qemu:KEY=VALUE,…`: what QEMU reads, by a `qemu-storage-daemon`.
    Qemu(QemuDisk),
}

impl StorageSpec {
    /// The name of an export that was given none.
    #[must_use]
    pub fn default_name(&self) -> String {
        match self {
            Self::Null { .. } => "null".into(),
            Self::Memory { .. } => "mem".into(),
            Self::File { path, .. } | Self::VhostUser { socket: path } => path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            Self::Rbd(image) => image.image.clone(),
            Self::Qemu(disk) => disk.default_name(),
        }
    }

    /// The same with relative paths resolved from `folder`.
    #[must_use]
    pub fn resolved(self, folder: &Path) -> Self {
        match self {
            Self::File {
                path,
                cache,
                format,
            } => Self::File {
                path: folder.join(path),
                cache,
                format,
            },
            Self::Rbd(image) => Self::Rbd(ImageName {
                conf: image.conf.map(|conf| folder.join(conf)),
                ..image
            }),
            Self::VhostUser { socket } => Self::VhostUser {
                socket: folder.join(socket),
            },
            Self::Qemu(disk) => Self::Qemu(disk.resolved(folder)),
            other => other,
        }
    }
}

impl fmt::Display for StorageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null { size_bytes } => write!(f, "null:{}", format_size(*size_bytes)),
            Self::Memory { size_bytes } => write!(f, "mem:{}", format_size(*size_bytes)),
            Self::File { path, .. } => {
                write!(f, "file:{}", commas::escape(&path.to_string_lossy()))
            }
            Self::Qemu(disk) => write!(f, "{disk}"),
            Self::Rbd(image) => write!(f, "rbd:{}", commas::escape(&image.to_string())),
            Self::VhostUser { socket } => {
                write!(
                    f,
                    "vhost-user:{}",
                    commas::escape(&socket.to_string_lossy())
                )
            }
        }
    }
}

/// One SPEC, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// As it was written.
    pub text: String,
    /// NAME, if there is one.
    pub name: Option<String>,
    /// KIND and ARG.
    pub storage: StorageSpec,
    /// A path without `file:`, which means a file if there is one.
    pub(super) is_bare_path: bool,
    /// The keys that are export options.
    pub(super) options: ArgMatches,
    /// `fault:RULE;…;` before KIND: how the storage shall fail, for tests.
    #[cfg(feature = "testing")]
    pub faults: Vec<Rule>,
}

/// The keys of a SPEC with `file:`.
#[derive(Args)]
struct FileKeys {
    #[command(flatten)]
    _export: ExportOptions,
    #[arg(long, value_enum)]
    cache: Option<CacheMode>,
    #[arg(long, value_enum)]
    format: Option<ImageFormat>,
}

/// The keys of a SPEC with `rbd:`.
#[derive(Args)]
struct RbdKeys {
    #[command(flatten)]
    _export: ExportOptions,
    #[arg(long)]
    conf: Option<PathBuf>,
    #[arg(long)]
    user: Option<String>,
}

impl FromStr for Spec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let spec = parse(text).map_err(|why| ConfigError::new(format!("'{text}': {why}")))?;
        Ok(Self {
            text: text.to_owned(),
            ..spec
        })
    }
}

fn parse(text: &str) -> Result<Spec, String> {
    let Some((head, rest)) = text.split_once(':') else {
        return parse_bare_path(text);
    };
    let (name, kind) = match head.split_once('=') {
        Some((name, kind)) => (Some(name), kind),
        None => (None, head),
    };
    if is_path(kind) {
        return parse_bare_path(text);
    }
    if let Some(name) = name {
        check_name(name).map_err(|error| error.to_string())?;
    }
    #[cfg(feature = "testing")]
    if kind == "fault" {
        let disk = with_faults(rest)?;
        return Ok(Spec {
            name: name.map(str::to_owned).or(disk.name.clone()),
            ..disk
        });
    }
    let mut keys = commas::split(rest);
    let arg = match kind {
        "qemu" => String::new(),
        _ => keys.remove(0),
    };
    let blockdev = match kind {
        "qemu" | "qcow2" => take_blockdev(&mut keys)?,
        _ => BTreeMap::new(),
    };
    let pairs = keys.iter().map(|part| commas::key_value(part));
    let options = match kind {
        "null" | "mem" | "vhost-user" | "qcow2" | "qemu" => read_keys::<ExportOptions>(pairs),
        "file" => read_keys::<FileKeys>(pairs),
        "rbd" => read_keys::<RbdKeys>(pairs),
        _ => {
            return Err(format!(
                "no storage is called '{kind}': there are null:SIZE, mem:SIZE, file:PATH, rbd:POOL/IMAGE, \
                 vhost-user:SOCKET, qcow2:PATH and qemu:KEY=VALUE,…"
            ));
        }
    };
    let mut options = options.map_err(|error| match error.is_unknown {
        true => format!("{error} (a comma in a path is written twice)"),
        false => error.to_string(),
    })?;
    let storage = match kind {
        "null" => StorageSpec::Null {
            size_bytes: disk_size(&arg)?,
        },
        "mem" => StorageSpec::Memory {
            size_bytes: disk_size(&arg)?,
        },
        "rbd" => {
            let image = image_name(&arg).ok_or_else(|| {
                format!("'{arg}' names no image: write rbd:POOL/IMAGE, rbd:POOL/NAMESPACE/IMAGE or either with @SNAPSHOT")
            })?;
            StorageSpec::Rbd(ImageName {
                conf: options.remove_one("conf"),
                user: options.remove_one("user"),
                ..image
            })
        }
        "vhost-user" if arg.is_empty() => {
            return Err(
                "no socket after 'vhost-user:': write vhost-user:/run/disk.sock, for instance"
                    .into(),
            );
        }
        "qcow2" => StorageSpec::Qemu(QemuDisk::qcow2(&arg, blockdev)?),
        "qemu" => StorageSpec::Qemu(QemuDisk::new(blockdev)?),
        "vhost-user" => StorageSpec::VhostUser { socket: arg.into() },
        _ if arg.is_empty() => {
            return Err("no path after 'file:': write file:/srv/disk.img, for instance".into());
        }
        _ => StorageSpec::File {
            path: arg.into(),
            cache: options.remove_one("cache").unwrap_or_default(),
            format: options.remove_one("format"),
        },
    };
    Ok(Spec {
        text: String::new(),
        name: name.map(str::to_owned),
        storage,
        is_bare_path: false,
        options,
        #[cfg(feature = "testing")]
        faults: Vec::new(),
    })
}

/// Takes the keys that are no export options: those are QEMU's.
fn take_blockdev(keys: &mut Vec<String>) -> Result<BTreeMap<String, String>, String> {
    let known = ExportOptions::augment_args(Command::new("keys"));
    let is_own = |key: &str| {
        known
            .get_arguments()
            .any(|known| known.get_long() == Some(key))
    };
    let mut taken = BTreeMap::new();
    let mut own = Vec::new();
    for part in keys.drain(..) {
        match commas::key_value(&part) {
            (key, _) if is_own(key) => own.push(part),
            (key, Some(value)) if !key.is_empty() => {
                taken.insert(key.to_owned(), value.to_owned());
            }
            _ => {
                return Err(format!(
                    "'{part}' is no KEY=VALUE (a comma in a path is written twice)"
                ));
            }
        }
    }
    *keys = own;
    Ok(taken)
}

/// Whether a part of a SPEC cannot be a NAME or a KIND: there is a folder in it, or it is followed by keys.
fn is_path(part: &str) -> bool {
    part.contains(['/', ','])
}

/// `[NAME=]PATH[,key=value…]`
fn parse_bare_path(text: &str) -> Result<Spec, String> {
    if text.is_empty() {
        return Err(
            "no storage: write KIND:ARG with null:SIZE, mem:SIZE, file:PATH, rbd:POOL/IMAGE or vhost-user:SOCKET"
                .into(),
        );
    }
    let (name, path) = match text.split_once('=') {
        Some((name, path)) if !is_path(name) => (format!("{name}="), path),
        _ => (String::new(), text),
    };
    let spec = parse(&format!("{name}file:{path}"))?;
    Ok(Spec {
        is_bare_path: true,
        ..spec
    })
}

impl Spec {
    /// Checks that what was written without a KIND is a file that exists.
    pub(super) fn check_path(&self, folder: &Path) -> Result<(), ConfigError> {
        match &self.storage {
            StorageSpec::File { path, .. } if self.is_bare_path && !folder.join(path).exists() => {
                Err(ConfigError::new(format!(
                    "'{}': there is no file called {}: write the path of an image, qcow2:PATH, null:SIZE or mem:SIZE \
                     (for an empty image: truncate -s 10G {})",
                    self.text,
                    path.display(),
                    path.display()
                )))
            }
            _ => Ok(()),
        }
    }
}

/// `RULE;…;KIND:ARG…` behind `fault:`.
#[cfg(feature = "testing")]
fn with_faults(text: &str) -> Result<Spec, String> {
    let (rules, disk) = text
        .rsplit_once(';')
        .ok_or("no disk behind the faults: write fault:RULE;…;KIND:ARG")?;
    let rules: Result<Vec<Rule>, _> = rules.split(';').map(str::parse).collect();
    Ok(Spec {
        faults: rules.map_err(|error| error.to_string())?,
        ..parse(disk)?
    })
}

/// `POOL/[NAMESPACE/]IMAGE[@SNAPSHOT]`
fn image_name(text: &str) -> Option<ImageName> {
    let (place, snapshot) = match text.split_once('@') {
        Some((place, snapshot)) => (place, Some(snapshot)),
        None => (text, None),
    };
    let parts: Vec<&str> = place.split('/').collect();
    let (pool, namespace, image) = match parts[..] {
        [pool, image] => (pool, None, image),
        [pool, namespace, image] => (pool, Some(namespace), image),
        _ => return None,
    };
    let names = [Some(pool), namespace, Some(image), snapshot];
    if names.into_iter().flatten().any(str::is_empty) {
        return None;
    }
    Some(ImageName {
        pool: pool.to_owned(),
        namespace: namespace.unwrap_or_default().to_owned(),
        image: image.to_owned(),
        snapshot: snapshot.map(str::to_owned),
        conf: None,
        user: None,
    })
}

fn disk_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    if bytes < SECTOR_BYTES {
        return Err(format!(
            "a disk of {bytes} bytes is smaller than a sector ({SECTOR_BYTES} bytes)"
        ));
    }
    if bytes > MAX_DISK_BYTES {
        return Err(format!(
            "a disk of {bytes} bytes is larger than {MAX_DISK_BYTES} bytes"
        ));
    }
    Ok(bytes)
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
