use clap::FromArgMatches;

use super::*;

fn options(spec: &Spec) -> ExportOptions {
    ExportOptions::from_arg_matches(&spec.options).unwrap()
}

#[test]
fn specs_are_parsed() {
    let spec: Spec = "d=file:/srv/a,,b:c=d.img,cache=buffered,serial=X1,read-only"
        .parse()
        .unwrap();
    assert_eq!(spec.name.as_deref(), Some("d"));
    assert_eq!(
        spec.storage,
        StorageSpec::File {
            path: "/srv/a,b:c=d.img".into(),
            cache: CacheMode::Buffered,
            format: None,
        }
    );
    assert_eq!(options(&spec).serial.as_deref(), Some("X1"));
    assert_eq!(options(&spec).read_only, Some(true));
    let spec: Spec = "mem:1G,block-size=4096,read-only=off,queues=2"
        .parse()
        .unwrap();
    assert_eq!(
        spec.storage,
        StorageSpec::Memory {
            size_bytes: 1 << 30
        }
    );
    let wanted = ExportOptions {
        block_size: Some(4096),
        read_only: Some(false),
        queues: Some(2),
        ..ExportOptions::default()
    };
    assert_eq!(options(&spec), wanted);
}

#[test]
fn a_path_is_shown_as_it_is_written_in_a_spec() {
    for text in [
        "file:/srv/a,,b.img",
        "mem:1G",
        "null:1536",
        "vhost-user:/run/a,,b.sock",
    ] {
        let spec: Spec = text.parse().unwrap();
        assert_eq!(spec.storage.to_string(), text);
    }
}

#[test]
fn an_image_of_a_cluster_is_named_with_its_pool() {
    let spec: Spec = "d=rbd:vms/tenant/disk@then,conf=/etc/c.conf,user=u,queues=2"
        .parse()
        .unwrap();
    let image = ImageName {
        pool: "vms".into(),
        namespace: "tenant".into(),
        image: "disk".into(),
        snapshot: Some("then".into()),
        conf: Some("/etc/c.conf".into()),
        user: Some("u".into()),
    };
    assert_eq!(spec.storage, StorageSpec::Rbd(image));
    assert_eq!(spec.storage.to_string(), "rbd:vms/tenant/disk@then");
    assert_eq!(options(&spec).queues, Some(2));
    for text in [
        "disk",
        "/disk",
        "vms/",
        "vms//disk",
        "a/b/c/d",
        "vms/disk@",
        "",
    ] {
        let error = format!("rbd:{text}").parse::<Spec>().unwrap_err();
        assert!(error.to_string().contains("names no image"), "{error}");
    }
    // Relative to the folder of the configuration file.
    let spec: Spec = "rbd:vms/disk,conf=c.conf".parse().unwrap();
    let StorageSpec::Rbd(image) = spec.storage.resolved("/srv".as_ref()) else {
        unreachable!("it is one")
    };
    assert_eq!(image.conf.as_deref(), Some("/srv/c.conf".as_ref()));
}

#[test]
fn another_server_is_named_by_its_socket() {
    let spec: Spec = "vhost-user:run/vm7.sock,queues=2".parse().unwrap();
    assert_eq!(spec.storage.default_name(), "vm7");
    assert_eq!(options(&spec).queues, Some(2));
    let StorageSpec::VhostUser { socket } = spec.storage.resolved("/srv".as_ref()) else {
        unreachable!("it is one")
    };
    assert_eq!(socket, std::path::Path::new("/srv/run/vm7.sock"));
    let error = "vhost-user:".parse::<Spec>().unwrap_err();
    assert!(error.to_string().contains("no socket after"), "{error}");
}

#[test]
fn a_disk_may_be_told_to_fail() {
    let text = "d=fault:write=eio@0-1M/3*2;any=delay20;flush=stall;mem:1M,serial=X";
    let spec: Spec = text.parse().unwrap();
    assert_eq!(spec.name.as_deref(), Some("d"));
    assert_eq!(spec.faults.len(), 3);
    assert_eq!(spec.storage.to_string(), "mem:1M");
    assert_eq!(options(&spec).serial.as_deref(), Some("X"));
    let plain: Spec = "mem:1M".parse().unwrap();
    assert!(plain.faults.is_empty());
    for (text, why) in [
        ("fault:mem:1M", "no disk behind"),
        ("fault:write=eio;", "no storage"),
        ("fault:write;mem:1M", "'write' is not a fault"),
        ("fault:write=ebad;mem:1M", "'write=ebad' is not a fault"),
        ("fault:erase=eio;mem:1M", "is not a fault"),
        ("fault:read=eio/0;mem:1M", "is not a fault"),
        ("fault:read=eio@1M;mem:1M", "is not a fault"),
        ("fault:read=delay;mem:1M", "is not a fault"),
    ] {
        let error = text.parse::<Spec>().unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_path_without_a_kind_is_a_file_that_exists() {
    let folder = tempfile::tempdir().unwrap();
    for (text, name, path) in [
        ("disk.img", None, "disk.img"),
        ("d=other.img,queues=2", Some("d"), "other.img"),
        ("x=./b:c,,d.img,read-only", Some("x"), "./b:c,d.img"),
    ] {
        let spec: Spec = text.parse().unwrap();
        assert_eq!(spec.name.as_deref(), name, "{text}");
        let StorageSpec::File { path: found, .. } = &spec.storage else {
            panic!("{text}: {:?}", spec.storage)
        };
        assert_eq!(found, &PathBuf::from(path));
        let error = spec.check_path(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("no file called {path}")), "{error}");
        std::fs::write(folder.path().join(path), "").unwrap();
        spec.check_path(folder.path()).unwrap();
    }
    // What is not there may be made by the time that the file is opened, if the kind is written.
    let spec: Spec = "file:nothing".parse().unwrap();
    spec.check_path(folder.path()).unwrap();
}

#[test]
fn a_malformed_spec_gets_one_line_that_quotes_it() {
    for (spec, why) in [
        ("", "no storage"),
        ("qcow9:x", "no storage is called 'qcow9'"),
        ("=mem:1G", "not a name"),
        ("a/b=mem:1G", "not a name"),
        ("mem:", "not a size"),
        ("mem:1X", "not a size"),
        ("mem:0", "smaller than a sector"),
        ("null:511", "smaller than a sector"),
        ("mem:8E", "larger than 9223372036854771712 bytes"),
        ("file:x,format=qcow2", "give one of raw"),
        ("mem:1G,block-size=3", "block-size: invalid value '3'"),
        ("mem:1G,cache=direct", "cache: unknown key"),
        ("mem:1G,readonly", "did you mean 'read-only'"),
        ("mem:1G,", "unknown key"),
        ("mem:1G,queues=0", "from 1 to 64"),
        ("mem:1G,serial=a b", "serial: invalid value 'a b'"),
        ("file:", "no path"),
        ("file:x,cache=some", "give one of auto, direct, buffered"),
        ("file:x,read-only=maybe", "read-only: invalid value 'maybe'"),
        ("file:x,y=z", "y: unknown key"),
    ] {
        let error = spec.parse::<Spec>().unwrap_err().to_string();
        assert!(error.contains(why), "{spec}: {error}");
        assert!(error.starts_with(&format!("'{spec}'")), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}
