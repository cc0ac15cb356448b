//! What the kernel shows of a disk in sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// The directory of a disk.
#[derive(Debug)]
pub struct Sysfs(PathBuf);

impl Sysfs {
    /// Of a device node, or of a disk's name.
    pub fn of(device: impl AsRef<Path>) -> Result<Self> {
        let name = device.as_ref().file_name().context("a disk without name")?;
        let dir = Path::new("/sys/block").join(name);
        ensure!(dir.exists(), "there is no disk {}", name.display());
        Ok(Self(dir))
    }

    /// An attribute, such as `queue/scheduler`.
    pub fn get(&self, name: &str) -> Result<String> {
        let path = self.0.join(name);
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.trim().to_owned())
    }

    /// An attribute that is a number.
    pub fn number(&self, name: &str) -> Result<u64> {
        let text = self.get(name)?;
        (text.parse()).with_context(|| format!("{name} is no number: {text}"))
    }

    /// Sets an attribute.
    pub fn set(&self, name: &str, value: &str) -> Result<()> {
        let path = self.0.join(name);
        fs::write(&path, value)
            .with_context(|| format!("cannot write {value} to {}", path.display()))
    }

    /// The size.
    pub fn size_bytes(&self) -> Result<u64> {
        Ok(self.number("size")? * 512)
    }

    /// Hardware queues.
    pub fn queues(&self) -> Result<usize> {
        let queues = fs::read_dir(self.0.join("mq")).context("a disk without queues")?;
        Ok(queues.count())
    }
}
