//! Loop devices and mounts, which need root.

use std::path::PathBuf;
use std::process::Command;

use crate::{run, sparse};

/// A loop device over a new file; gone with the value.
pub struct Loop {
    pub device: PathBuf,
    pub backing: PathBuf,
    _dir: tempfile::TempDir,
}

impl Loop {
    pub fn new(len_bytes: u64, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backing = sparse(dir.path(), len_bytes);
        let to_backing = [arguments, &[backing.to_str().unwrap()]].concat();
        let device = run(
            "losetup",
            &[&["--find", "--show"], &to_backing[..]].concat(),
        );
        Self {
            device: device.into(),
            backing,
            _dir: dir,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("-d").arg(&self.device).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}

/// A mounted file system; unmounted with the value.
pub struct Mounted(pub tempfile::TempDir);

impl Mounted {
    /// `mount ARGUMENTS DIRECTORY`
    pub fn new(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().to_str().unwrap();
        run("mount", &[arguments, &[place]].concat());
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(self.0.path()).status();
        assert!(done.is_ok_and(|status| status.success()) || std::thread::panicking());
    }
}
