//! Formats: each is written, its daemon killed, and what QEMU finds in the image is what was flushed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use testkit::process::spawn_bound;
use testkit::sandbox::Sandbox;

use crate::common::*;
use crate::rounds::*;
use crate::{daemons, is_over, kill, lab, qemu_img, serve};

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with an image `disk` of this format and these options.
fn image(format: &str, options: &[&str]) -> Option<(Sandbox, PathBuf)> {
    let lab = lab()?;
    let path = lab.path("disk");
    let words = [
        &["create", "-q", "-f", format],
        options,
        &[text(&path), "16M"],
    ];
    qemu_img(&words.concat());
    Some((lab, path))
}

/// Writes, flushes and kills the daemon, and compares what `source` names for `qemu-img convert`.
fn holds_what_was_flushed(lab: &Sandbox, spec: &str, source: &[&str]) {
    let server = serve(lab, &format!("d={spec}"));
    let mut client = client(lab, USUAL);
    for round in 1..=2 {
        let ended = write(&mut client, round);
        finish(&mut client, ended);
        assert_eq!(client.driver.request(T_FLUSH, 0, &[]).0, OK);
        daemons(lab).into_iter().for_each(kill);
        check(&mut client, round);
    }
    drop(client);
    server.stop().unwrap();
    assert!(daemons(lab).is_empty());
    let raw = lab.path("raw");
    qemu_img(&[&["convert"], source, &["-O", "raw", text(&raw)]].concat());
    let raw = File::open(raw).unwrap();
    for block in 0..4u16 {
        let mut found = pattern(2, block);
        let at = u64::from(block) * found.len() as u64;
        raw.read_exact_at(&mut found, at).unwrap();
        assert!(found == pattern(2, block), "block {block}");
    }
}

/// A format whose images are checked by `qemu-img check`, too.
fn is_whole(format: &str, options: &[&str]) {
    let Some((lab, path)) = image(format, options) else {
        return;
    };
    let spec = match format {
        "qcow2" => format!("qcow2:{}", path.display()),
        _ => format!(
            "qemu:driver={format},file.driver=file,file.filename={}",
            path.display()
        ),
    };
    holds_what_was_flushed(&lab, &spec, &["-f", format, text(&path)]);
    is_over(&lab, &path);
}

#[test]
fn a_compressed_image_with_zstd() {
    is_whole("qcow2", &["-o", "compression_type=zstd"]);
}

#[test]
fn an_image_with_subclusters() {
    is_whole("qcow2", &["-o", "extended_l2=on,cluster_size=128k"]);
}

#[test]
fn an_image_with_lazy_refcounts() {
    is_whole("qcow2", &["-o", "lazy_refcounts=on"]);
}

#[test]
fn a_vmdk_image() {
    is_whole("vmdk", &[]);
}

#[test]
fn a_vhdx_image() {
    is_whole("vhdx", &[]);
}

#[test]
fn a_vdi_image() {
    is_whole("vdi", &[]);
}

#[test]
fn a_chain_of_three() {
    let Some((lab, base)) = image("raw", &[]) else {
        return;
    };
    let (middle, top) = (lab.path("middle"), lab.path("top"));
    for (format, lower, upper) in [("raw", &base, &middle), ("qcow2", &middle, &top)] {
        let over = ["-F", format, "-b", text(lower), text(upper)];
        qemu_img(&[&["create", "-q", "-f", "qcow2"][..], &over].concat());
    }
    let before = [&base, &middle].map(|file| fs::read(file).unwrap());
    let spec = format!("qcow2:{}", top.display());
    holds_what_was_flushed(&lab, &spec, &["-f", "qcow2", text(&top)]);
    assert!(before == [&base, &middle].map(|file| fs::read(file).unwrap()));
    is_over(&lab, &top);
}

#[test]
fn an_encrypted_qcow2_image() {
    let Some(lab) = lab() else { return };
    let (path, key) = (lab.path("disk"), lab.path("key"));
    fs::write(&key, "a key that is long enough").unwrap();
    let secret = format!("secret,id=k,file={}", key.display());
    let options = "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10";
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "--object",
        &secret,
        "-o",
        options,
        text(&path),
        "16M",
    ]);
    let without = format!("d=qcow2:{}", path.display());
    lab.serve_fails(
        &["--ublk", "no", &without],
        1,
        &["encrypt.format=luks,encrypt.key-secret=k,secret.k=FILE"],
    );
    let spec = format!(
        "qcow2:{},encrypt.format=luks,encrypt.key-secret=k,secret.k={}",
        path.display(),
        key.display()
    );
    let named = format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=k,file.filename={}",
        path.display()
    );
    holds_what_was_flushed(&lab, &spec, &["--object", &secret, "--image-opts", &named]);
    let stored = fs::read(&path).unwrap();
    let plain = &pattern(2, 0)[..64];
    assert!(!stored.windows(64).any(|part| part == plain), "plain text");
    qemu_img(&["check", "-q", "--object", &secret, "--image-opts", &named]);
    lab.is_clean();
}

/// What QEMU's block layer reaches over a socket.
#[test]
fn a_disk_of_an_nbd_server() {
    let Some((lab, path)) = image("raw", &[]) else {
        return;
    };
    let socket = lab.path("nbd");
    let mut command = Command::new("qemu-storage-daemon");
    let node = format!("driver=file,node-name=n,filename={}", path.display());
    let address = format!(
        "addr.type=unix,addr.path={},max-connections=0",
        socket.display()
    );
    command.args(["--blockdev", &node, "--nbd-server", &address]);
    command.args(["--export", "type=nbd,id=e,node-name=n,name=x,writable=on"]);
    let mut peer = spawn_bound(&mut command).unwrap();
    eventually("it listens", || socket.exists());
    let spec = format!(
        "qemu:driver=nbd,server.type=unix,server.path={},export=x",
        socket.display()
    );
    let source = format!("nbd+unix:///x?socket={}", socket.display());
    holds_what_was_flushed(&lab, &spec, &["-f", "raw", &source]);
    peer.kill().unwrap();
    peer.wait().unwrap();
    lab.is_clean();
}
