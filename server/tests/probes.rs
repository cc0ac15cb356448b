//! The static probes that docs/operations.md tells tracers of.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

use std::collections::BTreeMap;
use std::fs;

use object::elf::FileHeader64;
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, elf};

/// The type of the notes that describe probes (`sys/sdt.h`).
const PROBE: u32 = 3;

#[test]
fn the_program_has_the_probes_with_their_arguments() {
    let program = fs::read(env!("CARGO_BIN_EXE_ublkup")).unwrap();
    let header = FileHeader64::<Endianness>::parse(&*program).unwrap();
    let endian = header.endian().unwrap();
    let sections = header.sections(endian, &*program).unwrap();
    let (_, section) = sections.section_by_name(endian, b".note.stapsdt").unwrap();
    assert_eq!(section.sh_type(endian), elf::SHT_NOTE);
    let mut notes = section.notes(endian, &*program).unwrap().unwrap();
    let mut found = BTreeMap::new();
    while let Some(note) = notes.next().unwrap() {
        assert_eq!(
            (note.name(), note.n_type(endian).0),
            (&b"stapsdt"[..], PROBE)
        );
        // Addresses of the probe, of the section's base, and of the count of tracers; provider, probe, arguments.
        let (addresses, texts) = note.desc().split_at(24);
        let has_count_of_tracers = addresses[16..] != [0; 8];
        let mut texts = texts
            .split(|&byte| byte == 0)
            .map(|text| str::from_utf8(text).unwrap());
        let name = format!("{}:{}", texts.next().unwrap(), texts.next().unwrap());
        let arguments = texts.next().unwrap().split_whitespace().count();
        // A probe is there once for each place that its function is inlined at.
        let earlier = found.insert(name, (arguments, has_count_of_tracers));
        assert!(earlier.is_none_or(|earlier| earlier == (arguments, has_count_of_tracers)));
    }
    let expected = [("ublkup:request_begin", 4), ("ublkup:request_end", 5)];
    let expected = expected.map(|(name, arguments)| (name.to_owned(), (arguments, true)));
    assert_eq!(found, BTreeMap::from(expected));
}
