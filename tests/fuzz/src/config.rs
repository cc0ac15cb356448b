//! A SPEC, or a configuration file if there is more than one line.
//!
//! What must hold: it is refused with one line, or it is an export; and what is saved of an export, for a server that
//! recovers it, is the same export.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};
use ublkup::config::{
    ConfigError, ExportConfig, ExportOptions, SavedExport, Spec, check_together, read_config,
};

/// Runs one input.
pub fn run(input: &[u8]) {
    if input.contains(&b'\n') {
        let file = File::from(memfd_create("config", MemfdFlags::CLOEXEC).expect("a file"));
        file.write_all_at(input, 0).expect("written");
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let Some(exports) = check(read_config(&path, &ExportOptions::default())) else {
            return;
        };
        for export in &exports {
            check_saved(export);
        }
        check(check_together(&exports));
    } else if let Ok(text) = std::str::from_utf8(input) {
        let Some(spec) = check(text.parse::<Spec>()) else {
            return;
        };
        assert_eq!(spec.text, text);
        let made = ExportConfig::new(spec, ExportOptions::default(), Path::new("/srv"));
        if let Some(export) = check(made) {
            check_saved(&export);
        }
    }
}

/// A refusal says why.
fn check<T>(result: Result<T, ConfigError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let text = error.to_string();
            assert!(!text.trim().is_empty(), "a refusal without a reason");
            None
        }
    }
}

fn check_saved(export: &ExportConfig) {
    let text = serde_json::to_string(&export.saved).expect("JSON");
    let saved: SavedExport = serde_json::from_str(&text).expect("what was saved");
    assert_eq!(saved, export.saved);
    let again = saved.export().expect("what was an export is one");
    assert_eq!(&again, export, "what was saved is another export");
}
