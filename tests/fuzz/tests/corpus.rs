//! The targets without a fuzzer: each with its corpus, and with inputs that are made of it. Every input is the same in each
//! run.

use std::fs;
use std::path::Path;

use fuzz::{TARGETS, Target};
use testkit::random::Random;

/// Longest input that is made.
const MAX_BYTES: usize = 512;

fn corpus(target: Target) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let entries = fs::read_dir(&folder).expect("a corpus");
    let mut paths: Vec<_> = entries
        .map(|entry| entry.expect("an input").path())
        .collect();
    paths.sort();
    let read = |path| fs::read(path).expect("an input");
    paths.into_iter().map(read).collect()
}

/// Changes an input in one to eight places: bytes replaced, put in, taken out, or the end of another input behind it.
fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    for _ in 0..1 + random.index(8) {
        let at = random.index(input.len() + 1);
        let byte = random.bytes(1)[0];
        match random.below(5) {
            0 => input.insert(at, byte),
            1 if at < input.len() => drop(input.remove(at)),
            2 => {
                let other = &corpus[random.index(corpus.len())];
                input.truncate(at);
                input.extend(&other[random.index(other.len() + 1)..]);
            }
            3 if at < input.len() => input[at] ^= 1 << random.below(8),
            _ if at < input.len() => input[at] = byte,
            _ => {}
        }
    }
    input.truncate(MAX_BYTES);
}

/// Runs the corpus of a target, then so many inputs made of it.
fn run(name: &str, made: usize) {
    let found = TARGETS.iter().find(|target| target.name == name);
    let target = *found.expect("a target");
    let corpus = corpus(target);
    assert!(!corpus.is_empty(), "{name} has no corpus");
    for input in &corpus {
        (target.run)(input);
    }
    let mut random = Random(7);
    for number in 0..made {
        let mut input = corpus[random.index(corpus.len())].clone();
        mutate(&mut input, &corpus, &mut random);
        let ran = std::panic::catch_unwind(|| (target.run)(&input));
        assert!(ran.is_ok(), "{name}: made input {number}: {input:?}");
    }
}

/// How many inputs are made for each target: of each about a second's worth.
const MADE: [(&str, usize); TARGETS.len()] = [
    ("vring", 3000),
    ("messages", 400),
    ("inflight", 2000),
    ("config", 500),
    ("admin", 5000),
    ("registry", 500),
    ("ring", 300),
];

/// In one test, so that nothing else in this process opens a descriptor: a target looks for those that are left.
#[test]
fn every_target_bears_its_corpus_and_what_is_made_of_it() {
    for (name, made) in MADE {
        run(name, made);
    }
}
