//! When an end spins, and when it asks for a coalesced wake-up.

use super::*;

/// How many of so many sleeps are coalesced, if each of those pays or none does.
fn coalesced(coalescing: &mut Coalescing, sleeps: usize, pays: bool) -> usize {
    let mut count = 0;
    for _ in 0..sleeps {
        if coalescing.is_due() {
            coalescing.learn(pays);
            count += 1;
        }
    }
    count
}

#[test]
fn a_ping_pong_is_hardly_ever_coalesced() {
    let mut coalescing = Coalescing::new(true);
    let first = coalesced(&mut coalescing, 10_000, false);
    assert!((2..=12).contains(&first), "{first}");
    let later = coalesced(&mut coalescing, 100_000, false);
    assert!((10..=30).contains(&later), "{later}");
}

#[test]
fn a_stream_is_coalesced_from_early_on_and_until_it_ends() {
    let mut coalescing = Coalescing::new(true);
    assert!(coalesced(&mut coalescing, 1000, true) > 980);
    assert!(coalesced(&mut coalescing, 100, false) < 5);
    // A stream that starts later is found, too.
    coalesced(&mut coalescing, 10_000, false);
    assert!(coalesced(&mut coalescing, 20_000, true) > 10_000);
}

#[test]
fn an_end_that_never_tries_is_never_coalesced() {
    assert_eq!(coalesced(&mut Coalescing::new(false), 100_000, true), 0);
}

#[test]
fn a_spin_is_longer_when_it_helped() {
    let mut counters = Counters::default();
    let mut spin = Spin::new(true, false);
    for _ in 0..20 {
        assert!(!spin.until(|| false, &mut counters));
    }
    assert_eq!(spin.limit, SPIN_MIN);
    for _ in 0..20 {
        assert!(spin.until(|| true, &mut counters));
    }
    assert_eq!((spin.limit, counters.system_calls), (SPIN_MAX, 0));
    let mut yields = Spin::new(true, true);
    assert!(!yields.until(|| false, &mut counters));
    assert_eq!(counters.system_calls, u64::from(YIELDS_MAX));
    assert!(Spin::new(false, true).until(|| true, &mut counters));
}
