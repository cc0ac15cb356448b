//! Images of all kinds, and what is said of those that cannot be served.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::common::*;
use crate::{Disk, daemons, is_over, kill, lab, qemu_img, serve};

#[test]
fn an_image_is_read_written_flushed_discarded_and_grown() {
    let Some(Disk { lab, path, spec }) = Disk::new() else {
        return;
    };
    let server = lab.serve(&["--sandbox=yes", "--ublk", "no", &spec]);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(8, &[5; 65536]), OK);
    assert_eq!(driver.request(T_FLUSH, 0, &[]).0, OK);
    assert_eq!(driver.read(8, 65536), (OK, vec![5; 65536]));
    assert_eq!(driver.segment(T_WRITE_ZEROES, 8, 8, 0), OK);
    assert_eq!(driver.segment(T_DISCARD, 16, 8, 0), OK);
    assert_eq!(driver.read(8, 4096), (OK, vec![0; 4096]));
    lab.ok(&["resize", "d", "32M"]);
    let size = || {
        let stat: serde_json::Value =
            serde_json::from_str(&lab.ok(&["stat", "d", "--json"])).unwrap();
        stat["size_bytes"].as_u64().unwrap()
    };
    assert_eq!(size(), 32 << 20);
    assert_eq!(driver.write((32 << 11) - 8, &[6; 4096]), OK);
    assert_eq!(driver.request(T_FLUSH, 0, &[]).0, OK);
    // A confined server has its daemon started again.
    kill(daemons(&lab)[0]);
    assert_eq!(driver.read((32 << 11) - 8, 4096), (OK, vec![6; 4096]));
    assert_eq!(size(), 32 << 20);
    drop(driver);
    server.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn an_image_over_another_one_leaves_that_as_it_is() {
    let Some(lab) = lab() else { return };
    let base = lab.image("base.img", 16 << 20);
    let file = fs::File::options().write(true).open(&base).unwrap();
    file.write_all_at(&[3; 8192], 4096).unwrap();
    let top = lab.path("top.qcow2");
    let [base_text, top_text] = [&base, &top].map(|path| path.to_str().unwrap());
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_text, top_text,
    ]);
    let server = serve(&lab, &format!("d=qcow2:{top_text}"));
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.read(8, 8192), (OK, vec![3; 8192]));
    assert_eq!(driver.write(8, &[4; 4096]), OK);
    assert_eq!(driver.read(16, 4096), (OK, vec![3; 4096]));
    drop(driver);
    server.stop().unwrap();
    assert!(fs::read(&base).unwrap()[4096..][..8192] == [3; 8192]);
    is_over(&lab, &top);
}

#[test]
fn an_encrypted_image_is_served_with_its_key_only() {
    let Some(lab) = lab() else { return };
    let (path, key) = (lab.path("disk.luks"), lab.path("key"));
    fs::write(&key, "a key that is long enough").unwrap();
    let secret = format!("secret,id=k,file={}", key.display());
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "luks",
        "--object",
        &secret,
        "-o",
        "key-secret=k,iter-time=10",
        path.to_str().unwrap(),
        "16M",
    ]);
    let spec = format!(
        "d=qemu:driver=luks,file.driver=file,file.filename={}",
        path.display()
    );
    lab.serve_fails(
        &["--ublk", "no", &spec],
        1,
        &["key-secret", "secret.k=FILE"],
    );
    assert!(daemons(&lab).is_empty());
    let spec = format!("{spec},key-secret=k,secret.k={}", key.display());
    let server = serve(&lab, &spec);
    let mut driver = Driver::running(lab.connect("d"), USUAL);
    assert_eq!(driver.write(0, &[7; 4096]), OK);
    assert_eq!(driver.read(0, 4096), (OK, vec![7; 4096]));
    drop(driver);
    server.stop().unwrap();
    let stored = fs::read(&path).unwrap();
    assert!(
        !stored.windows(64).any(|part| part == [7; 64]),
        "plain text"
    );
    assert!(daemons(&lab).is_empty());
    lab.is_clean();
}

#[test]
fn what_cannot_be_served_is_said_and_leaves_nothing() {
    let Some(Disk { lab, path, spec }) = Disk::new() else {
        return;
    };
    let fails = |spec: &str, words: &[&str]| {
        lab.serve_fails(&["--ublk", "no", spec], 1, words);
        assert!(daemons(&lab).is_empty());
        lab.is_clean();
    };
    fails(
        "d=qcow2:/none.qcow2",
        &["No such file", "make the image first"],
    );
    let raw = lab.image("raw.img", 1 << 20);
    let raw_spec = format!("d=qcow2:{}", raw.display());
    fails(&raw_spec, &["not in qcow2 format", "qemu-img info"]);
    // Marked as corrupt: bit 1 of the incompatible features.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[2], 79).unwrap();
    fails(&spec, &["corrupt"]);
    // Only dirty: bit 0. It is repaired.
    file.write_all_at(&[1], 79).unwrap();
    let server = serve(&lab, &spec);
    let other = sandbox();
    other.serve_fails(
        &["--ublk", "no", &spec],
        1,
        &["lock", "another process has the image open"],
    );
    assert!(daemons(&other).is_empty());
    other.is_clean();
    server.stop().unwrap();
    is_over(&lab, &path);
}

#[test]
fn a_backing_file_whose_format_would_be_guessed_is_refused() {
    let Some(lab) = lab() else { return };
    let (base, top) = (lab.image("base.img", 1 << 20), lab.path("top.qcow2"));
    let [base_text, top_text] = [&base, &top].map(|path| path.to_str().unwrap());
    let options = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base_text];
    qemu_img(&[&options[..], &[top_text]].concat());
    // The header's word of the format is an end of its extensions now, as in images of old.
    let mut image = std::fs::read(&top).unwrap();
    let word = 0xe279_2acau32.to_be_bytes();
    let at = image.windows(4).position(|bytes| bytes == word).unwrap();
    image[at..at + 4].fill(0);
    std::fs::write(&top, image).unwrap();
    let spec = format!("d=qcow2:{top_text}");
    let why = [
        "does not say what format its backing file has",
        "qemu-img rebase -u -F",
    ];
    lab.fails(&["serve", "--ublk", "no", &spec], 1, &why);
    lab.is_clean();
    let said = format!(
        "{spec},backing.driver=raw,backing.file.driver=file,backing.file.filename={base_text}"
    );
    serve(&lab, &said).stop().unwrap();
    is_over(&lab, &top);
}
