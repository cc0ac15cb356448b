//! Peers that write to every word that they can, or are killed.

use std::io::{self, ErrorKind, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fd_ring::RingError;

use crate::common::transport;
use crate::peer::{SIZE, Words, with_hostile_consumer, with_hostile_producer};
use crate::tools::Random;

fn number(random: &mut Random) -> u32 {
    let [a, b, c, d, ..] = random.next().to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Writes random, sometimes nearly valid values into random words until it is stopped.
fn scribble(words: Words, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed);
    let mut last = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        // Positions and flags more often than the rest.
        let index = match number(&mut random) % 4 {
            0 => 0,
            // One of four seeds closes.
            1 => 32 + usize::from(seed.is_multiple_of(4) && number(&mut random).is_multiple_of(2)),
            _ => 34 + number(&mut random) as usize % (words.all().len() - 34),
        };
        last = match number(&mut random) % 4 {
            0 => number(&mut random),
            1 => last.wrapping_add(number(&mut random) % 8192),
            2 => number(&mut random) % 4,
            _ => 0,
        };
        words.all()[index].store(last, Ordering::Relaxed);
        for _ in 0..number(&mut random) % 512 {
            std::hint::spin_loop();
        }
    }
}

fn is_dead(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
    inner == Some(&RingError::Dead)
}

/// Calls `work` for some time, or until it returns true, while threads scribble into `words`.
fn among_scribblers(words: Vec<Words>, seed: u64, mut work: impl FnMut() -> bool) {
    let stop = Arc::new(AtomicBool::new(false));
    let start = |words| {
        let told = Arc::clone(&stop);
        std::thread::spawn(move || scribble(words, seed, &told))
    };
    let hostile: Vec<_> = words.into_iter().map(start).collect();
    let limit = Instant::now() + Duration::from_millis(100);
    while Instant::now() < limit && !work() {}
    stop.store(true, Ordering::Relaxed);
    for one in hostile {
        one.join().expect("the hostile peer ends");
    }
}

#[test]
fn a_producer_that_scribbles_everywhere_kills_the_ring_and_nothing_else() {
    let mut deaths = 0;
    for seed in 1..25 {
        let (mut consumer, words, _peer) = with_hostile_producer(seed);
        assert_eq!(consumer.transport(), transport());
        let mut buffer = vec![0; 8192];
        among_scribblers(words, seed, || match consumer.try_peek(1) {
            Ok(Some(bytes)) if bytes.is_empty() => true,
            Ok(Some(bytes)) => {
                let count = bytes.copy_to(&mut buffer);
                assert!(bytes.len() <= SIZE);
                consumer.consume(count);
                false
            }
            Ok(None) => false,
            Err(error) => {
                assert!(is_dead(&error), "{error}");
                // It stays dead.
                assert!(is_dead(&consumer.peek(1).expect_err("still dead")));
                deaths += 1;
                true
            }
        });
    }
    assert!(
        deaths > 5,
        "{deaths} deaths: does the consumer check positions?"
    );
}

#[test]
fn a_consumer_that_scribbles_kills_the_ring_and_nothing_else() {
    let mut deaths = 0;
    for seed in 1..25 {
        let (mut producer, words, _peer) = with_hostile_consumer();
        assert_eq!(producer.transport(), transport());
        let mut answers = 0;
        among_scribblers(vec![words], seed, || match producer.try_write(&[7; 1000]) {
            Ok(_) => {
                answers += 1;
                false
            }
            Err(error) => {
                assert!(is_dead(&error), "{error}");
                assert!(is_dead(&producer.write(b"x").expect_err("still dead")));
                deaths += 1;
                true
            }
        });
        assert!(answers > 0 || deaths > 0);
    }
    assert!(
        deaths > 5,
        "{deaths} deaths: does the producer check positions?"
    );
}

/// Attempts after which an end that does not sleep has noticed that its peer was killed.
const OFTEN: usize = 10_000;

#[test]
fn a_consumer_that_never_polls_learns_of_a_killed_producer_after_its_last_bytes() {
    let (mut consumer, words, peer) = with_hostile_producer(1);
    // The first of them is its position.
    words[0].all()[0].store(100, Ordering::Release);
    assert_eq!(
        consumer.try_peek(1).expect("asked").map(|b| b.len()),
        Some(100)
    );
    consumer.consume(100);
    for _ in 0..OFTEN {
        assert!(consumer.try_peek(1).expect("asked").is_none(), "it lives");
    }
    words[0].all()[0].store(107, Ordering::Release);
    // A kill closes descriptors; the last bytes stay in the ring.
    drop(peer);
    let mut last = 0;
    let end = (0..OFTEN).find_map(|_| {
        let bytes = consumer.try_peek(1).expect("asked")?.len();
        consumer.consume(bytes);
        last += bytes;
        (bytes == 0).then_some(())
    });
    assert!(end.is_some(), "the end of the stream is never seen");
    assert_eq!(last, 7);
}

#[test]
fn a_producer_that_never_polls_learns_of_a_killed_consumer() {
    let (mut producer, _words, peer) = with_hostile_consumer();
    let mut accepted = 0;
    while producer.try_write(&[7; 4096]).expect("written").is_some() {
        accepted += 1;
    }
    assert_eq!(accepted, SIZE / 4096);
    for _ in 0..OFTEN {
        assert!(producer.try_write(b"x").expect("asked").is_none());
    }
    drop(peer);
    let error = (0..OFTEN).find_map(|_| producer.try_write(b"x").err());
    let error = error.expect("that there is no reader is never seen");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
}
