//! `[NAME=]KIND:ARG[,key=value…]`

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::ConfigError;
use crate::request::{MAX_DISK_BYTES, SECTOR_BYTES};
use crate::request::{format_size, parse_size};
use crate::storage::{BadRule, CacheMode, Rule};

/// Where the data of an export lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StorageSpec {
    /// `null:SIZE`: takes everything, holds nothing.
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
    },
}

impl StorageSpec {
    /// What an export is called when nobody named it.
    #[must_use]
    pub fn default_name(&self) -> String {
        match self {
            Self::Null { .. } => "null".into(),
            Self::Memory { .. } => "mem".into(),
            Self::File { path, .. } => path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
        }
    }
}

impl fmt::Display for StorageSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null { size_bytes } => write!(f, "null:{}", format_size(*size_bytes)),
            Self::Memory { size_bytes } => write!(f, "mem:{}", format_size(*size_bytes)),
            Self::File { path, .. } => {
                write!(f, "file:{}", path.to_string_lossy().replace(',', ",,"))
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
    pub backend: StorageSpec,
    /// `,serial=TEXT`.
    pub serial: Option<String>,
    /// `,block-size=512…4096`.
    pub block_bytes: Option<u32>,
    /// `,read-only`.
    pub read_only: bool,
    /// `fault:RULE;…;` before KIND: how the disk shall fail, for tests.
    pub faults: Vec<Rule>,
}

impl FromStr for Spec {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let spec = parse(text).map_err(|why| ConfigError(format!("'{text}': {why}")))?;
        Ok(Self {
            text: text.to_owned(),
            ..spec
        })
    }
}

fn parse(text: &str) -> Result<Spec, String> {
    let (head, rest) = text.split_once(':').ok_or(
        "no backend: write KIND:ARG with null:SIZE, mem:SIZE or file:PATH, \
         e.g. mem:1G or disk=file:/srv/disk.img",
    )?;
    let (name, kind) = match head.split_once('=') {
        Some((name, kind)) => (Some(name), kind),
        None => (None, head),
    };
    if let Some(name) = name {
        super::check_name(name).map_err(|error| error.to_string())?;
    }
    if kind == "fault" {
        let (rules, disk) = rest
            .rsplit_once(';')
            .ok_or("no disk behind the faults: write fault:RULE;…;KIND:ARG")?;
        let disk = parse(disk)?;
        let mut faults = rules
            .split(';')
            .map(str::parse)
            .collect::<Result<Vec<Rule>, BadRule>>()
            .map_err(|error| error.to_string())?;
        faults.extend(disk.faults.iter().cloned());
        return Ok(Spec {
            name: name.map(str::to_owned).or(disk.name.clone()),
            faults,
            ..disk
        });
    }
    let mut parts = split_commas(rest).into_iter();
    let arg = parts.next().unwrap_or_default();
    let mut backend = match kind {
        "null" => StorageSpec::Null {
            size_bytes: disk_size(&arg)?,
        },
        "mem" => StorageSpec::Memory {
            size_bytes: disk_size(&arg)?,
        },
        "file" if arg.is_empty() => return Err("no path after 'file:'".into()),
        "file" => StorageSpec::File {
            path: arg.into(),
            cache: CacheMode::Auto,
        },
        _ => {
            return Err(format!(
                "no backend is called '{kind}': there are null, mem and file"
            ));
        }
    };
    let (mut serial, mut block_bytes, mut read_only) = (None, None, false);
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((&part, ""));
        match (key, &mut backend) {
            ("serial", _) => serial = Some(value.to_owned()),
            ("block-size", _) => block_bytes = Some(block_size(value)?),
            ("read-only", _) => read_only = switch(key, value)?,
            ("cache", StorageSpec::File { cache, .. }) => {
                *cache = match value {
                    "auto" => CacheMode::Auto,
                    "direct" => CacheMode::Direct,
                    "buffered" => CacheMode::Buffered,
                    _ => return Err(format!("cache={value}: give auto, direct or buffered")),
                }
            }
            _ => {
                return Err(format!(
                    "'{kind}' has no option '{key}' (a comma in a path is written twice)"
                ));
            }
        }
    }
    let spec = Spec {
        text: String::new(),
        name: name.map(str::to_owned),
        backend,
        serial,
        block_bytes,
        read_only,
        faults: Vec::new(),
    };
    if let StorageSpec::Null { size_bytes } | StorageSpec::Memory { size_bytes } = spec.backend {
        let block_bytes = u64::from(spec.block_bytes.unwrap_or(512));
        if size_bytes % block_bytes != 0 {
            return Err(format!(
                "a size of {size_bytes} bytes is no multiple of the block size, {block_bytes}"
            ));
        }
    }
    Ok(spec)
}

fn disk_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|error| error.to_string())?;
    if bytes < SECTOR_BYTES {
        return Err(format!(
            "a disk of {bytes} bytes is smaller than a sector ({SECTOR_BYTES} bytes)"
        ));
    }
    if bytes > MAX_DISK_BYTES {
        return Err(format!("a disk of {bytes} bytes is larger than 16T"));
    }
    Ok(bytes)
}

fn block_size(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(bytes @ (512 | 1024 | 2048 | 4096)) => Ok(bytes),
        _ => Err(format!("block-size={text}: give 512, 1024, 2048 or 4096")),
    }
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "" | "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={value}: give on or off")),
    }
}

/// Splits at commas; a doubled comma stands for one.
fn split_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter != ',' || letters.next_if_eq(&',').is_some() {
            if let Some(last) = parts.last_mut() {
                last.push(letter);
            }
        } else {
            parts.push(String::new());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_parsed() {
        let spec: Spec = "d=file:/srv/a,,b:c=d.img,cache=buffered,serial=X1,read-only"
            .parse()
            .unwrap();
        assert_eq!(spec.name.as_deref(), Some("d"));
        assert_eq!(
            spec.backend,
            StorageSpec::File {
                path: "/srv/a,b:c=d.img".into(),
                cache: CacheMode::Buffered
            }
        );
        assert_eq!(spec.serial.as_deref(), Some("X1"));
        assert!(spec.read_only);
        let spec: Spec = "mem:1G,block-size=4096,read-only=off".parse().unwrap();
        assert_eq!(
            spec.backend,
            StorageSpec::Memory {
                size_bytes: 1 << 30
            }
        );
        assert_eq!(spec.block_bytes, Some(4096));
        assert!(!spec.read_only);
    }

    #[test]
    fn a_disk_may_be_told_to_fail() {
        let text = "d=fault:write=eio@0-1M/3*2;any=delay20;flush=stall;mem:1M,serial=X";
        let spec: Spec = text.parse().unwrap();
        assert_eq!(spec.name.as_deref(), Some("d"));
        assert_eq!(spec.faults.len(), 3);
        assert_eq!(spec.backend.to_string(), "mem:1M");
        assert_eq!(spec.serial.as_deref(), Some("X"));
        let plain: Spec = "mem:1M".parse().unwrap();
        assert!(plain.faults.is_empty());
        for (text, why) in [
            ("fault:mem:1M", "no disk behind"),
            ("fault:write=eio;", "no backend"),
            ("fault:write;mem:1M", "'write' is no fault"),
            ("fault:write=ebad;mem:1M", "'write=ebad' is no fault"),
            ("fault:erase=eio;mem:1M", "is no fault"),
            ("fault:read=eio/0;mem:1M", "is no fault"),
            ("fault:read=eio@1M;mem:1M", "is no fault"),
            ("fault:read=delay;mem:1M", "is no fault"),
        ] {
            let error = text.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_malformed_spec_gets_one_line_that_quotes_it() {
        for (spec, why) in [
            ("", "no backend"),
            ("disk.img", "no backend"),
            ("qcow9:x", "no backend is called 'qcow9'"),
            ("=mem:1G", "no name"),
            ("a/b=mem:1G", "no name"),
            ("mem:", "no size"),
            ("mem:1X", "no size"),
            ("mem:0", "smaller than a sector"),
            ("null:511", "smaller than a sector"),
            ("null:1000", "no multiple"),
            ("mem:17T", "larger than 16T"),
            ("mem:512,block-size=4096", "no multiple"),
            ("mem:1G,block-size=3", "block-size=3"),
            ("mem:1G,cache=direct", "no option 'cache'"),
            ("mem:1G,", "no option ''"),
            ("file:", "no path"),
            ("file:x,cache=some", "cache=some"),
            ("file:x,read-only=maybe", "read-only=maybe"),
            ("file:x,y=z", "no option 'y'"),
        ] {
            let error = spec.parse::<Spec>().unwrap_err().to_string();
            assert!(error.contains(why), "{spec}: {error}");
            assert!(error.starts_with(&format!("'{spec}'")), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }
}
