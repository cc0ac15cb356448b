use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>, why: &str) {
    let error = result.expect_err("refused");
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
    assert!(error.to_string().contains(why), "{error}");
}

#[test]
fn links_other_kinds_and_what_others_may_write_to_are_refused() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = TrustedDir::open(temp.path()).expect("opened");
    dir.make_dir("real", 0o755).expect("made");
    fs::write(temp.path().join("note"), "text").expect("written");
    symlink("real", temp.path().join("link")).expect("linked");
    symlink("note", temp.path().join("note-link")).expect("linked");
    let fifo = temp.path().join("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, 0o600.into(), 0).expect("a FIFO");
    assert_eq!(dir.read("note").expect("read"), "text");
    refused(dir.dir("link"), "symbolic link");
    refused(TrustedDir::open(&temp.path().join("link")), "symbolic link");
    refused(dir.make_dir("link", 0o755), "symbolic link");
    refused(dir.dir("note"), "not a directory");
    refused(dir.read("note-link"), "symbolic link");
    refused(dir.read("fifo"), "not a regular file");
    refused(dir.file("real", OFlags::RDWR), "not a regular file");
    refused(dir.socket("note"), "not a socket");
    for mode in [0o777, 0o775] {
        set_mode(&temp.path().join("real"), mode);
        refused(dir.dir("real"), "may write to it");
    }
    set_mode(&temp.path().join("note"), 0o602);
    refused(dir.read("note"), "may write to it");
    assert_eq!(
        dir.names().expect("read"),
        ["fifo", "link", "note", "note-link", "real"]
    );
}

#[test]
fn what_was_opened_stays_when_its_path_leads_elsewhere() {
    let temp = tempfile::tempdir().expect("a directory");
    let (ours, theirs) = (temp.path().join("ours"), temp.path().join("theirs"));
    let dir = TrustedDir::make(&ours, 0o755).expect("made");
    fs::write(ours.join("note"), "ours").expect("written");
    fs::create_dir(&theirs).expect("made");
    fs::write(theirs.join("note"), "theirs").expect("written");
    fs::rename(&ours, temp.path().join("moved")).expect("moved");
    symlink(&theirs, &ours).expect("linked");
    assert_eq!(dir.read("note").expect("read"), "ours");
}

#[test]
fn a_path_lasts_only_below_directories_in_which_others_cannot_exchange_anything() {
    let temp = tempfile::tempdir().expect("a directory");
    let (above, dir) = (temp.path().join("above"), temp.path().join("above/dir"));
    fs::create_dir_all(&dir).expect("made");
    let path = lasting_path(&dir).expect("lasting");
    symlink(&above, temp.path().join("link")).expect("linked");
    assert_eq!(
        lasting_path(&temp.path().join("link/dir")).expect("lasting"),
        path
    );
    set_mode(&above, 0o777);
    refused(lasting_path(&dir), "exchange");
    set_mode(&above, 0o1777);
    assert_eq!(lasting_path(&dir).expect("lasting"), path);
}
