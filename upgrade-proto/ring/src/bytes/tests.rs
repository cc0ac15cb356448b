//! Copies of all alignments and lengths.

use super::*;

#[test]
fn every_start_and_length_is_copied_whole() {
    let source: Vec<u8> = (0..64).map(|n| n * 3).collect();
    for start in 0..source.len() {
        for end in start..source.len() {
            let bytes = Bytes::of(&source[start..end]);
            assert_eq!(bytes.to_vec(), source[start..end]);
            let mut short = [0xee; 9];
            let copied = bytes.copy_to(&mut short);
            assert_eq!(copied, (end - start).min(9));
            assert_eq!(short[..copied], source[start..start + copied]);
            assert!(short[copied..].iter().all(|byte| *byte == 0xee));
        }
    }
}

#[test]
fn every_place_and_length_is_stored_whole_and_nothing_beside_it() {
    let source: Vec<u8> = (1..=40).collect();
    for (place, exclusive) in (0..32).map(|number| (number / 2, number % 2 == 0)) {
        for len_bytes in 0..source.len() {
            let mut target = [0_u8; 64];
            let mut space = Space::of(&mut target[place..]);
            space.exclusive = exclusive;
            space.put(0, &source[..len_bytes]);
            assert_eq!(target[place..place + len_bytes], source[..len_bytes]);
            let beside = target[..place].iter().chain(&target[place + len_bytes..]);
            assert!(
                beside.copied().all(|byte| byte == 0),
                "{place}, {len_bytes}"
            );
        }
    }
}

#[test]
fn words_are_whole_at_aligned_places_only() {
    let memory = [0_usize; 3];
    let start = NonNull::from(&memory).cast::<u8>();
    for place in 0..WORD_BYTES {
        for count in 0..=2 * WORD_BYTES {
            // SAFETY: inside `memory`.
            let whole = is_whole_words(unsafe { start.add(place) }, count);
            assert_eq!(whole, place == 0 && count % WORD_BYTES == 0);
        }
    }
}

#[test]
fn parts_never_reach_beyond_the_whole() {
    let source: Vec<u8> = (0..10).collect();
    let bytes = Bytes::of(&source);
    assert_eq!(bytes.first(3).to_vec(), [0, 1, 2]);
    assert_eq!(bytes.first(30).to_vec(), source);
    assert_eq!(bytes.after(8).to_vec(), [8, 9]);
    assert!(bytes.after(11).is_empty());
    assert_eq!(bytes.after(4).array(), Some([4, 5]));
    assert_eq!(bytes.after(9).array::<2>(), None);
}
