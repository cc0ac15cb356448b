use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN};

use super::*;

const GUEST: u64 = 1 << 30;

fn vring(indirect: bool) -> Vring {
    Vring::new(RingMemory::new(2, GUEST).unwrap().into(), 1, indirect)
}

const READ: Command = Command {
    kind: VIRTIO_BLK_T_IN,
    sector: 77,
    range: None,
    is_read: true,
};

fn segment(number: u32) -> Segment {
    Segment {
        guest: u64::from(number) << 20,
        len_bytes: 512,
    }
}

impl Vring {
    /// What the server finds in a descriptor: address, length, flags, next.
    fn found(&self, at: usize) -> (u64, u32, u16, u16) {
        let memory = self.slice();
        (
            memory.read_obj(at).unwrap(),
            memory.read_obj(at + 8).unwrap(),
            memory.read_obj(at + 12).unwrap(),
            memory.read_obj(at + 14).unwrap(),
        )
    }

    /// The server returns a chain.
    fn use_chain(&self, index: u16, head: u32, status: u8) {
        let memory = self.slice();
        let slot = USED + 4 + usize::from(index % SIZE) * 8;
        memory.write_obj(head, slot).unwrap();
        if let Some(control) = usize::try_from(head).ok().filter(|head| *head < 256) {
            let status_at = CONTROL + control * CONTROL_BYTES + STATUS;
            memory.write_obj(status, status_at).unwrap();
        }
        memory.write_obj(index.wrapping_add(1), USED + 2).unwrap();
    }
}

#[test]
fn a_request_is_a_chain_of_header_data_and_status() {
    for indirect in [false, true] {
        let mut vring = vring(indirect);
        let head = vring.submit(&READ, &[segment(1), segment(2)]);
        let base = GUEST + EACH_BYTES as u64;
        let mut place = usize::from(head) * 16;
        let table = TABLES + usize::from(head) * TABLE_BYTES;
        if indirect {
            let whole = (base + table as u64, 64, 4, 0);
            assert_eq!(vring.found(place), whole);
            place = table;
        }
        let mut chain = vec![vring.found(place)];
        while chain.last().unwrap().2 & 1 != 0 {
            let next = usize::from(chain.last().unwrap().3) * 16;
            chain.push(vring.found(if indirect { table + next } else { next }));
        }
        let control = base + (CONTROL + usize::from(head) * CONTROL_BYTES) as u64;
        let chain: Vec<_> = chain.iter().map(|one| (one.0, one.1, one.2 & 2)).collect();
        let expected = [
            (control, 16, 0),
            (1 << 20, 512, 2),
            (2 << 20, 512, 2),
            (control + 32, 1, 2),
        ];
        assert_eq!(chain, expected);
        let control = CONTROL + usize::from(head) * CONTROL_BYTES;
        assert_eq!(vring.slice().read_obj::<u64>(control + 8).unwrap(), 77);
        assert_eq!(vring.slice().read_obj::<u16>(AVAILABLE + 2).unwrap(), 1);
        assert_eq!(vring.reap(), Ok(None));
        vring.use_chain(0, head.into(), 1);
        assert_eq!(vring.reap(), Ok(Some((head, 1))));
        assert_eq!((vring.reap(), vring.free.len()), (Ok(None), 256));
    }
}

#[test]
fn a_range_has_its_place_before_the_status() {
    let mut vring = vring(true);
    let command = Command {
        kind: VIRTIO_BLK_T_DISCARD,
        sector: 8,
        range: Some((16, 1)),
        is_read: false,
    };
    let head = vring.submit(&command, &[]);
    let control = CONTROL + usize::from(head) * CONTROL_BYTES;
    let memory = vring.slice();
    assert_eq!(memory.read_obj::<u64>(control + 8).unwrap(), 0);
    assert_eq!(memory.read_obj::<u64>(control + RANGE).unwrap(), 8);
    assert_eq!(memory.read_obj::<u32>(control + RANGE + 8).unwrap(), 16);
    assert_eq!(memory.read_obj::<u32>(control + RANGE + 12).unwrap(), 1);
    let table = TABLES + usize::from(head) * TABLE_BYTES;
    assert_eq!(vring.found(table + 16).1, 16);
    assert_eq!(vring.found(table + 32).1, 1);
}

#[test]
fn descriptors_come_back_through_all_turns_of_the_indexes() {
    for indirect in [false, true] {
        let mut vring = vring(indirect);
        for turn in 0..70_000u32 {
            let index = u16::try_from(turn % 65536).unwrap();
            assert!(vring.has_room(MAX_SEGMENTS));
            let head = vring.submit(&READ, &[segment(1), segment(2), segment(3)]);
            vring.use_chain(index, head.into(), 0);
            assert_eq!(vring.reap(), Ok(Some((head, 0))));
        }
        let mut given = 0;
        while vring.has_room(1) {
            vring.submit(&READ, &[segment(1)]);
            given += 1;
        }
        assert_eq!(
            (vring.in_flight(), given),
            if indirect { (256, 256) } else { (85, 85) }
        );
    }
}

#[test]
fn whatever_a_server_writes_each_request_ends_once_or_the_server_is_caught() {
    let mut random = testkit::random::Random(7);
    let mut caught = 0;
    'rings: for _ in 0..2000 {
        let mut vring = vring(random.below(2) == 0);
        let mut given = std::collections::BTreeSet::new();
        for _ in 0..200 {
            while vring.has_room(2) && random.below(4) > 0 {
                assert!(given.insert(vring.submit(&READ, &[segment(1), segment(2)])));
            }
            // Anywhere in the rings and in what belongs to the requests; mostly where it matters.
            let at = match random.below(4) {
                0 => USED + 2,
                1 => USED + 4 + 8 * random.index(256),
                2 => CONTROL + STATUS + CONTROL_BYTES * random.index(256),
                _ => random.index(EACH_BYTES - 4),
            };
            let word = match random.below(3) {
                0 => random.next_u64(),
                _ => random.below(8),
            };
            let word = &word.to_le_bytes()[..4];
            vring.slice().write_slice(word, at).unwrap();
            loop {
                match vring.reap() {
                    Ok(None) => break,
                    Ok(Some((head, status))) => {
                        assert!(given.remove(&head) && status <= 2);
                    }
                    Err(_) => {
                        caught += 1;
                        continue 'rings;
                    }
                }
            }
            assert_eq!(usize::from(vring.in_flight()), given.len());
        }
    }
    assert!(caught > 1000, "{caught}");
}

#[test]
fn what_no_server_does_is_noticed() {
    let answer = |head: &dyn Fn(u16) -> u32, index: u16, status: u8| {
        let mut vring = vring(true);
        let first = vring.submit(&READ, &[segment(1)]);
        vring.submit(&READ, &[segment(1)]);
        vring.use_chain(index, head(first), status);
        vring.reap()
    };
    let own = |head: u16| u32::from(head);
    assert!(matches!(answer(&own, 0, 0), Ok(Some(_))));
    assert_eq!(answer(&|_| 17, 0, 0), Err(Violation::Head(17)));
    assert_eq!(answer(&|_| 256, 0, 0), Err(Violation::Head(256)));
    let own_and_more = |head: u16| u32::from(head) | 1 << 16;
    assert!(matches!(
        answer(&own_and_more, 0, 0),
        Err(Violation::Head(_))
    ));
    assert_eq!(answer(&own, 2, 0), Err(Violation::Index(3)));
    assert_eq!(
        answer(&own, u16::MAX - 1, 0),
        Err(Violation::Index(u16::MAX))
    );
    assert_eq!(answer(&own, 0, 3), Err(Violation::Status(3)));
    assert_eq!(
        answer(&own, 0, NO_STATUS),
        Err(Violation::Status(NO_STATUS))
    );
    // Twice.
    let mut vring = vring(true);
    let first = vring.submit(&READ, &[segment(1)]);
    vring.submit(&READ, &[segment(1)]);
    vring.use_chain(0, first.into(), 0);
    assert!(matches!(vring.reap(), Ok(Some(_))));
    vring.use_chain(1, first.into(), 0);
    assert_eq!(vring.reap(), Err(Violation::Head(first.into())));
}
