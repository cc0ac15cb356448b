//! What keeps an image from being served.

use testkit::sandbox::Sandbox;
use ublkup::storage::{ImageName, Rbd};

use crate::common::*;
use crate::{ARGS, Image, serve};

#[test]
#[ignore = "needs a Ceph cluster"]
fn what_cannot_be_opened_is_told_in_a_line() {
    let lab = sandbox();
    let conf = std::env::var("CEPH_CONF").unwrap();
    let text = std::fs::read_to_string(&conf).unwrap();
    let with = |name: &str, text: &str| {
        let path = lab.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let keyring = with(
        "keyring",
        "[client.admin]\n\tkey = AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==\n",
    );
    let wrong_key = text.lines().map(|line| match line.starts_with("keyring") {
        true => format!("keyring = {keyring}\n"),
        false => format!("{line}\n"),
    });
    let wrong_key = with("wrong-key.conf", &wrong_key.collect::<String>());
    let no_monitor = with("empty.conf", "[global]\n");
    for (spec, words) in [
        (
            "rbd:rbd/none".to_owned(),
            "rbd/none: cannot open the image: No such file or directory (os error 2); rbd ls",
        ),
        (
            "rbd:none/none".to_owned(),
            "cannot open the pool: No such file",
        ),
        (
            "rbd:rbd/none,conf=/nowhere".to_owned(),
            "cannot read the cluster's configuration",
        ),
        (
            format!("rbd:rbd/none,conf={wrong_key}"),
            "cannot connect to the cluster",
        ),
        (
            format!("rbd:rbd/none,conf={no_monitor}"),
            "cannot connect to the cluster",
        ),
        (
            "rbd:rbd/none,user=stranger".to_owned(),
            "cannot connect to the cluster",
        ),
    ] {
        lab.serve_fails(&[&ARGS[..], &["--name", "d", &spec]].concat(), 1, &[words]);
    }
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn an_image_whose_metadata_break_a_promise_is_not_written_to() {
    let image = Image::new("promised", "64M");
    let lab = sandbox();
    let name = format!("rbd/{}", image.0);
    for (level, of) in [("image", name.as_str()), ("pool", "rbd")] {
        for (option, value) in [
            ("rbd_cache", "true"),
            ("rbd_blocklist_on_break_lock", "false"),
        ] {
            crate::rbd(&["config", level, "set", of, option, value]);
            let words = format!("the {level} sets {option} to '{value}'");
            lab.serve_fails(&[&ARGS[..], &[&image.spec()]].concat(), 1, &[&words]);
            let read_only = format!("{},read-only", image.spec());
            let server = lab.serve(&[&ARGS[..], &[&read_only]].concat());
            server.stop().unwrap();
            crate::rbd(&["config", level, "remove", of, option]);
        }
    }
    serve(&lab, &image).stop().unwrap();
    lab.is_clean();
}

/// A folder with something in the place of a library that cannot be loaded.
fn without_library(lab: &Sandbox) -> String {
    let folder = lab.path("broken");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("librados.so.2"), "").unwrap();
    folder.display().to_string()
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn the_doctor_looks_at_images_that_are_served() {
    let image = Image::new("examined", "64M");
    let lab = sandbox();
    let server = serve(&lab, &image);
    let told = lab.finish(&["doctor"], &[]).stdout;
    let words = "image: d: rbd:rbd/examined, 64M, client 127.0.0.1:0/";
    assert!(told.contains(words), "{told}");
    let folder = without_library(&lab);
    let env = [("LD_LIBRARY_PATH", folder.as_str())];
    let told = lab.finish(&["doctor"], &env).stdout;
    let words = "image: d: rbd: needs Ceph's client library: ";
    assert!(told.contains(words), "{told}");
    server.stop().unwrap();
    let refused = lab.finish(&["serve", "--ublk", "no", &image.spec()], &env);
    let words = "librados.so.2: file too short; install it (Debian: librbd1";
    assert!(refused.stderr.contains(words), "{}", refused.stderr);
    assert!(!lab.finish(&["doctor"], &[]).stdout.contains("Ceph"));
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_user_that_lacks_caps_is_told_which() {
    let image = Image::new("capped", "64M");
    let lab = sandbox();
    for (user, osd, fails) in [
        ("unable", "allow rwx pool=rbd", None),
        (
            "reader",
            "allow rx pool=rbd",
            Some("rbd:rbd/capped: cannot "),
        ),
        (
            "stranger",
            "allow r pool=other",
            Some("cannot open the image"),
        ),
    ] {
        let entity = format!("client.{user}");
        // Of an earlier run, with other caps perhaps.
        crate::ceph(&["auth", "rm", &entity]);
        let caps = ["mon", "allow r", "osd", osd];
        let key = crate::ceph(&[&["auth", "get-or-create", &entity][..], &caps].concat());
        let keyring = lab.path(user);
        std::fs::write(&keyring, key).unwrap();
        let conf = std::fs::read_to_string(std::env::var("CEPH_CONF").unwrap()).unwrap();
        let own = format!("[{entity}]\nkeyring = {}\n", keyring.display());
        let conf_path = lab.path(&format!("{user}.conf"));
        std::fs::write(&conf_path, format!("{conf}{own}")).unwrap();
        let spec = format!("{},user={user},conf={}", image.spec(), conf_path.display());
        let args = [&ARGS[..], &[&spec]].concat();
        let caps = "it needs the caps mon 'profile rbd' osd 'profile rbd pool=POOL'";
        if let Some(what) = fails {
            lab.serve_fails(&args, 1, &[what, &caps[3..]]);
            continue;
        }
        let log = lab.serve(&args).stop().unwrap();
        assert!(log.contains("may not bar a dead server"), "{log}");
        assert!(log.contains(caps), "{log}");
    }
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_cluster_that_does_not_answer_is_told_after_a_while() {
    let lab = sandbox();
    let conf = std::fs::read_to_string(std::env::var("CEPH_CONF").unwrap()).unwrap();
    let away = conf.lines().map(|line| match line.starts_with("mon_host") {
        // A port that is never listened on.
        true => "mon_host = v2:127.0.0.1:1/0\nclient_mount_timeout = 2\n".to_owned(),
        false => format!("{line}\n"),
    });
    let path = lab.path("away.conf");
    std::fs::write(&path, away.collect::<String>()).unwrap();
    let spec = format!("d=rbd:rbd/none,conf={}", path.display());
    let words = "cannot connect to the cluster: Connection timed out (os error 110); no monitor of the cluster answers";
    lab.serve_fails(&[&ARGS[..], &[&spec]].concat(), 1, &[words]);
}

/// A server may be asked again and again to add an export whose cluster cannot be reached.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_client_that_cannot_connect_leaves_no_threads() {
    let lab = sandbox();
    let conf = lab.path("empty.conf");
    std::fs::write(&conf, "[global]\n").unwrap();
    let name = ImageName {
        pool: "rbd".into(),
        namespace: String::new(),
        image: "none".into(),
        snapshot: None,
        conf: Some(conf),
        user: None,
    };
    let attempt = || {
        let error = Rbd::check(&name, true).unwrap_err().to_string();
        assert!(error.contains("cannot connect to the cluster"), "{error}");
    };
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    // The library may have some of its own.
    attempt();
    let before = threads();
    for _ in 0..5 {
        attempt();
    }
    assert_eq!(threads(), before);
}
