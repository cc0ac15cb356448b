//! The record of chains in flight: one that a server wrote that died between any two of its stores, and one that says
//! anything at all.
//!
//! What must hold: of an honest record, what was taken and not published comes back, once and in its order; of any
//! record only chains of the ring come back, each once, and a second look finds the same.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use ublkup::door::vhost::testing::{Record, at_each_access};

use crate::Script;

/// Vrings in the record; the last one is used.
const QUEUES: u16 = 2;

/// The largest ring that has a place in it.
const ENTRIES: u16 = 1024;

/// Bytes of a vring's part, and of the record.
const PART_BYTES: usize = 16 + 16 * ENTRIES as usize + 48;
const FILE_BYTES: usize = QUEUES as usize * PART_BYTES;

/// Chains that one input takes, at most.
const MAX_STEPS: usize = 64;

struct World {
    record: Record,
    file: Rc<File>,
    /// The parts of them that an input changed.
    copy: File,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Runs one input.
pub fn run(input: &[u8]) {
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(|| {
            let (record, file) = Record::create(QUEUES, 64).expect("a record");
            let len_bytes = file.metadata().expect("its length").len();
            assert_eq!(len_bytes, FILE_BYTES as u64);
            let (_, copy) = Record::create(QUEUES, 64).expect("a record");
            let file = Rc::new(file);
            World { record, file, copy }
        });
        let mut script = Script::new(input);
        let cleared = world.file.write_all_at(&[0; FILE_BYTES], 0);
        cleared.expect("written");
        match script.bool() {
            true => honest(world, &mut script),
            false => hostile(world, &mut script),
        }
    });
}

/// What a server did until it died.
#[derive(Clone, Default)]
struct Done {
    /// In flight, in the order in which they were taken.
    taken: Vec<u16>,
    /// Returned, and not published.
    returned: Vec<u16>,
    used: u16,
}

/// A server takes, returns and publishes, and dies at one of its accesses; the next one must resubmit what the driver has
/// no answer to. Where the server died within a step, the record may be of before it or after it.
fn honest(world: &World, script: &mut Script<'_>) {
    let size = 1 << (script.u8() % 7);
    let used = script.u16();
    let dies_at = u64::from(script.u16() % 1024);
    let mut queue = world.record.queue(QUEUES - 1, size).expect("a part");
    assert_eq!(queue.recover(used), Some(Vec::new()), "a new record");
    let accesses = Rc::new(Cell::new(0_u64));
    at_each_access(Some({
        let (file, copy) = (Rc::clone(&world.file), world.copy.try_clone());
        let (copy, accesses) = (copy.expect("cloned"), Rc::clone(&accesses));
        Box::new(move || {
            if accesses.replace(accesses.get() + 1) == dies_at {
                let mut part = [0; PART_BYTES];
                file.read_exact_at(&mut part, PART_BYTES as u64)
                    .expect("read");
                copy.write_all_at(&part, PART_BYTES as u64)
                    .expect("written");
            }
        })
    }));
    let mut done = Done {
        used,
        ..Done::default()
    };
    let mut possible = vec![done.clone()];
    for _ in 0..MAX_STEPS {
        if script.is_over() || accesses.get() > dies_at {
            break;
        }
        let before = done.clone();
        let what = script.u8();
        match what & 3 {
            0 | 1 => {
                let head = u16::from(what >> 2) % size;
                if done.taken.contains(&head) {
                    continue;
                }
                queue.take(head);
                done.taken.push(head);
            }
            2 => {
                let open: Vec<u16> = (done.taken.iter().copied())
                    .filter(|head| !done.returned.contains(head))
                    .collect();
                if open.is_empty() {
                    continue;
                }
                let head = open[usize::from(what >> 2) % open.len()];
                queue.returned(head);
                done.returned.push(head);
            }
            _ => {
                // The ring's index is stored first, which the record does not see.
                done.used = done
                    .used
                    .wrapping_add(u16::try_from(done.returned.len()).unwrap_or(0));
                let returned = std::mem::take(&mut done.returned);
                done.taken.retain(|head| !returned.contains(head));
                queue.published(done.used);
            }
        }
        possible = vec![done.clone()];
        // Until the chain is on record the driver's index is not read further, and the ring has it.
        if before.used == done.used {
            possible.push(before);
        }
    }
    at_each_access(None);
    let file: &File = match accesses.get() > dies_at {
        true => &world.copy,
        false => &world.file,
    };
    let next = Record::map(file, FILE_BYTES as u64, 0, QUEUES, 64).expect("mapped");
    let mut queue = next.queue(QUEUES - 1, size).expect("a part");
    let found = queue.recover(done.used).expect("an honest record");
    assert!(
        possible.iter().any(|done| done.taken == found),
        "{found:?} is none of {:?}",
        possible.iter().map(|done| &done.taken).collect::<Vec<_>>()
    );
    let mut queue = next.queue(QUEUES - 1, size).expect("a part");
    assert_eq!(queue.recover(done.used), Some(found), "a second look");
}

/// Any record, of any length, used with any ring, while it changes.
fn hostile(world: &World, script: &mut Script<'_>) {
    let size = script.pick(&[8, 1, 64, 1024, 0, 32768]);
    let (told, told_size) = (script.u16(), script.pick(&[64, 8, 1, 0, 1024, 65535]));
    let queues = script.pick(&[QUEUES, 1, 0, 128, 65535]);
    let len_bytes = match script.u8() {
        0 => FILE_BYTES as u64,
        1 => script.u64(),
        n => 64 * u64::from(n),
    };
    let offset_bytes = match script.u8() {
        0 => 0,
        1 => script.u64(),
        n => 64 * u64::from(n),
    };
    let (used, change_at) = (script.u16(), u64::from(script.u8()));
    let index = told % QUEUES.max(queues);
    let change = script.u64().to_le_bytes();
    let at = PART_BYTES as u64 + u64::from(script.u16()) % 0x440;
    let content = script.rest();
    let content = &content[..content.len().min(PART_BYTES)];
    let written = world.file.write_all_at(content, PART_BYTES as u64);
    written.expect("written");
    let Ok(record) = Record::map(&world.file, len_bytes, offset_bytes, queues, told_size) else {
        return;
    };
    let Ok(mut queue) = record.queue(index, size) else {
        return;
    };
    let seen = Rc::new(Cell::new(0_u64));
    let changes = change_at != 0;
    at_each_access(changes.then(|| -> Box<dyn FnMut()> {
        let (file, seen) = (Rc::clone(&world.file), Rc::clone(&seen));
        Box::new(move || {
            if seen.replace(seen.get() + 1) == change_at {
                file.write_all_at(&change, at).expect("written");
            }
        })
    }));
    let found = queue.recover(used);
    at_each_access(None);
    if let Some(found) = found {
        let each: BTreeSet<_> = found.iter().collect();
        assert_eq!(each.len(), found.len(), "a chain twice: {found:?}");
        assert!(found.iter().all(|&head| head < size), "{found:?}");
        if !changes {
            let again = record.queue(index, size).ok();
            let again = again.and_then(|mut queue| queue.recover(used));
            assert_eq!(again, Some(found.clone()), "a second look");
        }
        for &head in &found {
            queue.returned(head);
        }
        let returned = u16::try_from(found.len()).unwrap_or(0);
        queue.published(used.wrapping_add(returned));
        queue.take(0);
    }
    record.clear();
}
