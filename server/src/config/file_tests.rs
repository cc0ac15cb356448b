use super::*;
use crate::config::DoorMode;

fn parse(text: &str, options: &ExportOptions) -> Result<Vec<ExportConfig>, String> {
    let file = ConfigFile {
        name: "f.toml".into(),
        folder: Path::new("/etc/ublkup"),
        text,
    };
    let read = file.exports(options);
    read.map(|(_, exports)| exports)
        .map_err(|error| error.to_string())
}

#[test]
fn a_file_gives_exports_with_defaults_under_them() {
    let exports = parse(
        r#"
        [defaults]
        queues = 2
        ublk = "no"
        [[export]]
        spec = "a=mem:1G"
        poll-us = 0x20
        [[export]]
        name = "b"
        spec = "null:1G,serial=B,depth=8"
        queues = 0o3
        read-only = true
        "#,
        &ExportOptions {
            depth: Some(32),
            ..ExportOptions::default()
        },
    )
    .unwrap();
    let [a, b] = &exports[..] else {
        panic!("{exports:?}")
    };
    assert_eq!((a.name.as_str(), a.queues, a.depth), ("a", 2, 32));
    assert_eq!((b.name.as_str(), b.queues, b.depth), ("b", 3, 8));
    assert!(!a.read_only && b.read_only);
    assert_eq!((b.ublk, b.serial.as_str()), (DoorMode::No, "B"));
    assert_eq!(a.threads.polling.get().to_string(), "32");
}

#[test]
fn relative_paths_are_relative_to_the_file() {
    let text = "[[export]]\nspec = 'file:a.img'\nvhost-socket = 'a.sock'";
    let export = &parse(text, &ExportOptions::default()).unwrap()[0];
    assert_eq!(export.storage.to_string(), "file:/etc/ublkup/a.img");
    let socket = export.vhost_socket.as_deref();
    assert_eq!(socket, Some(Path::new("/etc/ublkup/a.sock")));
}

#[test]
fn a_bad_file_gets_one_line_with_line_key_and_what_is_allowed() {
    for (text, why) in [
        (
            "\n[[export]]\nname = 'a'",
            "f.toml:2: export 1: no spec, e.g. spec = \"file:/srv/disk.img\"",
        ),
        (
            "[[export]]\nspec = 3",
            "f.toml:2: export 1: spec: '': no storage: write KIND:ARG with null:SIZE, mem:SIZE, file:PATH, rbd:POOL/IMAGE or vhost-user:SOCKET",
        ),
        (
            "[[export]]\nspec = 'mem:1G'\n[[export]]\nspec = 'mem:1X'",
            "f.toml:4: export 2: spec: 'mem:1X': '1X' is not a size: give a number of bytes, or one with K, M, G, \
             T, P or E (powers of 1024)",
        ),
        (
            "[[export]]\nspec = 'a=mem:1G'\n\nqeues = 1",
            "f.toml:4: export 'a': qeues: unknown key; did you mean 'queues'?",
        ),
        (
            "[[export]]\nspec = 'mem:1G'\nname = 'b'\nqueues = -1",
            "f.toml:4: export 'b': queues: invalid value '-1': give a number from 1 to 64",
        ),
        (
            "[[export]]\nspec = 'mem:1G'\npoll-us = 'x'",
            "f.toml:3: export 1: poll-us: invalid value 'x': give a number of microseconds (0 to 1000000) or \
             'always'",
        ),
        (
            "[[export]]\nspec = 'mem:1G'\nqueues = [1]",
            "f.toml:3: export 1: queues: give a text, a number, true or false",
        ),
        (
            "[[export]]\nspec = 'mem:1G'\n[[export]]\nspec = 'b=mem:1G'\nublk = 'no'\nvhost = 'no'",
            "f.toml:3: export 'b': ublk and vhost are both 'no': leave one of the doors on",
        ),
        (
            "[defaults]\nname = 'a'\n[[export]]\nspec = 'mem:1G'",
            "f.toml:2: name: [defaults] cannot name exports: name each [[export]]",
        ),
        (
            "[defaults]\nublk = 'maybe'",
            "f.toml:2: [defaults]: ublk: invalid value 'maybe': give one of auto, yes, no",
        ),
        (
            "exports = 3",
            "f.toml:1: exports: unknown: there are [defaults] and [[export]]",
        ),
        (
            "[export]\nspec = 'mem:1G'",
            "f.toml:1: export: unknown: there are [defaults] and [[export]]",
        ),
    ] {
        assert_eq!(parse(text, &ExportOptions::default()).unwrap_err(), why);
    }
    let error = parse("\n[[export]\n", &ExportOptions::default()).unwrap_err();
    assert!(
        error.starts_with("f.toml:2: ") && !error.contains('\n'),
        "{error}"
    );
}

#[test]
fn a_folder_is_its_main_file_and_those_beside_it_with_the_defaults_of_the_main_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let read = || read_config(path, &ExportOptions::default()).map_err(|error| error.to_string());
    assert!(!is_configured(path));
    assert!(read().unwrap_err().ends_with("no [[export]] in it"));
    let write = |name: &str, text: &str| std::fs::write(path.join(name), text).unwrap();
    write("ublkup.toml", "[defaults]\nqueues = 2\nublk = \"no\"\n");
    assert!(read().unwrap_err().ends_with("no [[export]] in it"));
    std::fs::create_dir(path.join("exports.d")).unwrap();
    let export = |spec: &str| format!("[[export]]\nspec = \"{spec}\"\n");
    write("exports.d/2.toml", &export("b=file:x.img"));
    write(
        "exports.d/1.toml",
        &("[defaults]\nqueues = 3\n".to_owned() + &export("a=mem:1M")),
    );
    write("exports.d/.3.toml", "no TOML");
    write("exports.d/3.toml.dpkg-old", "no TOML");
    assert!(is_configured(path));
    let exports = read().unwrap();
    let found: Vec<_> = (exports.iter())
        .map(|one| (one.name.as_str(), one.queues, one.ublk))
        .collect();
    assert_eq!(found, [("a", 3, DoorMode::No), ("b", 2, DoorMode::No)]);
    let image = path.join("exports.d/x.img").display().to_string();
    assert_eq!(exports[1].storage.to_string(), format!("file:{image}"));
    write("exports.d/3.toml", "[[export]]\n");
    assert!(
        read()
            .unwrap_err()
            .contains("exports.d/3.toml:1: export 1: no spec")
    );
}
