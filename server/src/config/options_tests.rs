use super::*;
use clap::FromArgMatches;

fn read(pairs: &[(&str, Option<&str>)]) -> Result<ExportOptions, String> {
    let mut options = ExportOptions {
        depth: Some(7),
        queues: Some(7),
        ..ExportOptions::default()
    };
    let matches =
        read_keys::<ExportOptions>(pairs.iter().copied()).map_err(|error| error.to_string())?;
    options.update_from_arg_matches(&matches).unwrap();
    Ok(options)
}

#[test]
fn keys_update_what_was_given_elsewhere() {
    let options = read(&[
        ("queues", Some("1")),
        ("queues", Some("2")),
        ("ublk", Some("no")),
        ("read-only", None),
        ("migration", Some("off")),
    ]);
    let wanted = ExportOptions {
        depth: Some(7),
        queues: Some(2),
        ublk: Some(DoorMode::No),
        read_only: Some(true),
        migration: Some(false),
        ..ExportOptions::default()
    };
    assert_eq!(options, Ok(wanted));
}

#[test]
fn a_refusal_names_the_key_the_value_and_what_is_allowed() {
    for (key, value, refusal) in [
        (
            "queues",
            Some("0"),
            "queues: invalid value '0': give a number from 1 to 64",
        ),
        ("queues", None, "queues: give a value"),
        ("queues", Some(""), "queues: give a number from 1 to 64"),
        (
            "depth",
            Some("x"),
            "depth: invalid value 'x': give a number from 1 to 1024",
        ),
        (
            "ublk",
            Some("on"),
            "ublk: invalid value 'on': give one of auto, yes, no",
        ),
        (
            "read-only",
            Some("2"),
            "read-only: invalid value '2': give on or off",
        ),
        (
            "readonly",
            None,
            "readonly: unknown key; did you mean 'read-only'?",
        ),
        ("colour", Some("red"), "colour: unknown key"),
        ("help", None, "help: unknown key"),
        ("", None, ": unknown key"),
        ("-queues", Some("1"), "-queues: unknown key"),
    ] {
        assert_eq!(read(&[(key, value)]), Err(refusal.to_owned()));
    }
}
