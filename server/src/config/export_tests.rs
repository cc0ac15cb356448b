use super::*;
use crate::engine::polling::Polling;

fn export(spec: &str, options: ExportOptions) -> Result<ExportConfig, String> {
    let spec: Spec = spec.parse().map_err(|e: ConfigError| e.to_string())?;
    ExportConfig::new(spec, options, Path::new("/here")).map_err(|error| error.to_string())
}

fn none() -> ExportOptions {
    ExportOptions::default()
}

#[test]
fn names_come_from_the_spec_then_the_option_then_the_path() {
    let named = |name: &str| ExportOptions {
        name: Some(name.into()),
        ..none()
    };
    assert_eq!(export("a=null:1G", none()).unwrap().name, "a");
    assert_eq!(export("null:1G", named("b")).unwrap().name, "b");
    assert_eq!(export("null:1G,name=c", none()).unwrap().name, "c");
    assert_eq!(export("file:/x/disk.img", none()).unwrap().name, "disk");
    assert_eq!(export("mem:1G", none()).unwrap().name, "mem");
    assert!(export("a=mem:1G", named("b")).is_err());
}

#[test]
fn keys_of_the_spec_have_precedence() {
    let options = ExportOptions {
        queues: Some(2),
        depth: Some(2),
        read_only: Some(true),
        ..none()
    };
    let config = export("mem:1G,queues=3,read-only=off", options).unwrap();
    assert_eq!(
        (config.queues, config.depth, config.read_only),
        (3, 2, false)
    );
}

#[test]
fn contradictions_are_refused() {
    for (spec, why) in [
        (
            "null:1G,queues=2,vhost-threads=3",
            "3 is more than the queues (2)",
        ),
        ("null:1G,ublk=no,vhost=no", "both 'no'"),
        ("null:1G,ublk=no,ublk-id=1", "ublk-id"),
        ("null:1G,vhost=no,vhost-socket=x", "vhost-socket"),
        ("null:1G,vhost=no,migration", "migration"),
        ("null:1G,ublk-affinity,cpus=0", "both say where"),
        ("mem:1G,ublk-recovery=reissue", "cannot stay"),
        ("null:1000", "not a multiple"),
        ("mem:512,block-size=4096", "not a multiple"),
        ("null:1G,cpus=1023", "cpus: "),
    ] {
        let error = export(spec, none()).unwrap_err();
        assert!(error.contains(why), "{spec}: {error}");
        let name = spec.split(':').next().unwrap();
        assert!(error.starts_with(&format!("export '{name}': ")), "{error}");
    }
    let threads = |spec| export(spec, none()).unwrap().vhost_threads;
    assert_eq!(threads("null:1G,queues=8"), 8);
    assert_eq!(threads("null:1G,queues=8,vhost-threads=2"), 2);
}

#[test]
fn relative_paths_are_resolved_now_and_when_the_export_is_recovered() {
    let config = export("file:disk.img,vhost-socket=s", none()).unwrap();
    assert_eq!(config.storage.to_string(), "file:/here/disk.img");
    assert_eq!(config.vhost_socket.as_deref(), Some(Path::new("/here/s")));
    let note = serde_json::to_string(&config.saved).unwrap();
    let saved: SavedExport = serde_json::from_str(&note).unwrap();
    assert_eq!(saved.export().unwrap(), config);
}

#[test]
fn a_note_of_another_version_is_read_as_far_as_it_goes() {
    let note = r#"{"folder":"/x","spec":"a=mem:1G","options":{"queues":2,"gone":null}}"#;
    let saved: SavedExport = serde_json::from_str(note).unwrap();
    assert_eq!(saved.export().unwrap().queues, 2);
}

#[test]
fn exports_that_collide_are_told_by_name() {
    let pair = |a: &str, b: &str| {
        let exports = [a, b].map(|spec| export(spec, none()).unwrap());
        check_together(&exports).map_err(|error| error.to_string())
    };
    assert_eq!(pair("a=null:1G", "b=null:1G"), Ok(()));
    for (a, b, why) in [
        ("a=null:1G", "a=mem:1G", "two exports are called 'a'"),
        ("a=null:1G,ublk-id=3", "b=null:1G,ublk-id=3", "'b': ublk-id"),
        (
            "a=null:1G,vhost-socket=s",
            "b=null:1G,vhost-socket=/here/s",
            "'b': vhost-socket",
        ),
    ] {
        let error = pair(a, b).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_long_name_makes_a_serial_that_fits() {
    let name = "a-name-with-more-than-twenty-characters";
    let config = export(&format!("{name}=null:1G"), none()).unwrap();
    assert_eq!(config.serial.as_str(), &name[..20]);
}

fn saved(spec: &str, options: ExportOptions) -> SavedExport {
    let export = ExportConfig::new(spec.parse().unwrap(), options, Path::new("/srv"));
    export.unwrap().saved
}

#[test]
fn accounts_are_given_by_number_to_a_server_that_cannot_look_them_up() {
    let options = ExportOptions {
        vhost_socket_group: Some("daemon".parse().unwrap()),
        admin_socket_owner: Some("root".parse().unwrap()),
        ..ExportOptions::default()
    };
    let spec = "a=file:/x,,y.img,vhost-socket-group=root,queues=2,cache=buffered";
    let before = saved(spec, options);
    let after = before.clone().by_number().unwrap();
    assert_eq!(after.spec, "a=file:/x,,y.img,queues=2,cache=buffered");
    let group = after.options.vhost_socket_group.as_ref().unwrap();
    assert_eq!(
        (group.to_string(), group.id),
        ("0".into(), 0),
        "the SPEC has precedence"
    );
    assert_eq!(
        after
            .options
            .admin_socket_owner
            .as_ref()
            .unwrap()
            .to_string(),
        "0"
    );
    let difference = before.difference(&after.clone().export().unwrap()).unwrap();
    // The texts differ, and nothing else.
    assert_eq!(difference, Difference::default());
}

#[test]
fn a_difference_names_what_can_be_changed_and_what_cannot() {
    let wanted = |spec: &str| saved(spec, ExportOptions::default()).export().unwrap();
    let mut now = saved("a=mem:1M,queues=2,iops-total=5", ExportOptions::default());
    let same = "a=mem:1M,queues=2,iops-total=5,reconnect-grace=10,read-only=off";
    assert_eq!(
        now.difference(&wanted(same)).unwrap(),
        Difference::default()
    );
    let other = "a=mem:2M,queues=3,iops-total=6,bps-read=1K,read-only";
    let difference = now.difference(&wanted(other)).unwrap();
    let live = [("bps-read", "1024"), ("iops-total", "6")];
    assert_eq!(
        difference.live,
        live.map(|(key, value)| (key.into(), value.into())).into()
    );
    assert_eq!(difference.fixed, ["spec", "queues", "read-only"]);
    now.changed.insert("iops-total".into(), "6".into());
    let difference = now
        .difference(&wanted("a=mem:1M,queues=2,iops-total=5"))
        .unwrap();
    assert_eq!(difference.live, [("iops-total".into(), "5".into())].into());
    assert!(difference.fixed.is_empty());
}

#[test]
fn the_values_of_what_can_be_changed_are_all_of_it() {
    let values = LiveOptions::default().values();
    let given = LiveOptions {
        poll_us: Some(Polling::Never),
        reconnect_grace: Some(1),
        iops_total: Some(1),
        iops_read: Some(1),
        iops_write: Some(1),
        bps_total: Some(1),
        bps_read: Some(1),
        bps_write: Some(1),
        burst_ms: Some(1),
    };
    let keys = serde_json::to_value(&given).unwrap();
    let keys: Vec<_> = keys.as_object().unwrap().keys().cloned().collect();
    assert_eq!(values.keys().cloned().collect::<Vec<_>>(), keys);
    let mut changed = given;
    changed.change(&values).unwrap();
    assert_eq!(changed.values(), values);
}
