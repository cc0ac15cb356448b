//! Positions, and what the two ends see of each other.

use super::*;
use crate::memory::{FullFence, SharedWord};

fn at(position: u32) -> IndexPage<SharedWord> {
    let page = IndexPage::default();
    Word::store(&page.position, position, Relaxed);
    page
}

#[test]
fn a_position_that_cannot_be_is_refused_by_either_end() {
    let mut writer = Writer::new(16, 100, 90).expect("valid");
    for impossible in [89, 101, 0, u32::MAX, 100 + 16] {
        assert_eq!(
            writer.refresh(&at(impossible)),
            Err(Corrupt),
            "{impossible}"
        );
    }
    assert_eq!(writer.refresh(&at(100)), Ok(16));
    assert_eq!(writer.refresh(&at(99)), Err(Corrupt), "backwards");
    let mut reader = Reader::new(16, 100, 110).expect("valid");
    for impossible in [99, 109, 117, 0, u32::MAX] {
        assert_eq!(
            reader.refresh(&at(impossible)),
            Err(Corrupt),
            "{impossible}"
        );
    }
    assert_eq!(reader.refresh(&at(116)), Ok(16));
    assert!(Writer::new(16, 17, 0).is_err() && Reader::new(16, 0, 17).is_err());
}

#[test]
fn a_mark_is_passed_once_whatever_the_steps() {
    for (start, step) in [(0, 1), (u32::MAX - 5, 1), (0, 3), (7, 8), (u32::MAX, 16)] {
        let (producer, consumer) = (at(start), at(start));
        let mut writer = Writer::new(16, start, start).expect("valid");
        let mut passed = Vec::new();
        for _ in 0..16 / step {
            writer.commit::<_, FullFence>(&producer, &consumer, step);
            passed.push(writer.passed(&consumer, step, 8));
        }
        assert_eq!(passed.iter().filter(|passed| **passed).count(), 1);
        assert!(passed[8_u32.div_ceil(step) as usize - 1], "{passed:?}");
        // A consumer that took some sees to it that it is passed again.
        Word::store(&consumer.position, start.wrapping_add(9), Relaxed);
        writer.refresh(&consumer).expect("valid");
        let left = 16 / step * step - 9;
        writer.commit::<_, FullFence>(&producer, &consumer, 8 - left);
        assert!(writer.passed(&consumer, 8 - left, 8));
    }
}
