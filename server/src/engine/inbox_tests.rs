use std::sync::mpsc;
use std::thread;

use super::*;

const LIMIT: Duration = Duration::from_secs(60);

fn inbox() -> Inbox {
    Inbox::new(4).unwrap()
}

/// Sleeps until the bell rings.
fn wait_rung(ring: &mut Ring, inbox: &mut Inbox) {
    let mut out = Vec::with_capacity(4);
    while out.is_empty() {
        ring.submit_and_wait(1).unwrap();
        ring.reap(&mut out);
    }
    assert_eq!(out[0].token.owner, Owner::Bell);
    inbox.rang();
}

#[test]
fn results_come_in_the_order_in_which_they_were_posted() {
    let mut inbox = inbox();
    let tickets = [2, 0, 3].map(|slot| inbox.expect(slot));
    assert!(!inbox.has_results());
    assert_eq!(inbox.next_result(), None);
    let post = inbox.post();
    for (result, ticket) in (-1..).zip(tickets.into_iter().rev()) {
        post.deliver(ticket, result);
    }
    assert!(inbox.has_results());
    let results: Vec<_> = std::iter::from_fn(|| inbox.next_result()).collect();
    assert_eq!(results, [(3, -1), (0, 0), (2, 1)]);
    assert!(!inbox.has_results());
}

#[test]
fn a_result_that_comes_twice_ends_no_later_request() {
    let mut inbox = inbox();
    let post = inbox.post();
    let first = inbox.expect(1);
    post.deliver(first, 0);
    post.deliver(first, 0);
    assert_eq!(inbox.next_result(), Some((1, 0)));
    let second = inbox.expect(1);
    post.deliver(first, 0);
    assert_eq!(inbox.next_result(), None);
    post.deliver(second, 7);
    assert_eq!(inbox.next_result(), Some((1, 7)));
    assert_eq!((inbox.next_result(), inbox.strays()), (None, 2));
}

#[test]
fn the_bell_rings_only_for_a_thread_that_sleeps() {
    let mut ring = Ring::new(4).unwrap();
    let mut inbox = inbox();
    let post = inbox.post();
    let count = |inbox: &Inbox| {
        let mut fds = [PollFd::new(&inbox.shared.bell, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap()
    };
    // It is awake: no system call.
    let ticket = inbox.expect(0);
    post.deliver(ticket, 0);
    assert_eq!(count(&inbox), 0);
    // It does not go to sleep over a result.
    assert!(!inbox.listen(&mut ring));
    assert_eq!(inbox.next_result(), Some((0, 0)));
    for _ in 0..3 {
        let tickets = [0, 1].map(|slot| inbox.expect(slot));
        assert!(inbox.listen(&mut ring));
        let poster = thread::spawn({
            let post = post.clone();
            move || tickets.map(|ticket| post.deliver(ticket, 5))
        });
        wait_rung(&mut ring, &mut inbox);
        poster.join().unwrap();
        // The second of them did not ring again.
        assert_eq!(count(&inbox), 0);
        assert_eq!(
            (inbox.next_result(), inbox.next_result()),
            (Some((0, 5)), Some((1, 5)))
        );
    }
    // Something else has woken it: it is awake.
    let ticket = inbox.expect(0);
    assert!(inbox.listen(&mut ring));
    assert_eq!(inbox.next_result(), None);
    post.deliver(ticket, 0);
    assert_eq!(count(&inbox), 0);
    assert!(ring.drain(LIMIT, None));
}

#[test]
fn no_bell_is_lost_in_a_race() {
    let mut ring = Ring::new(4).unwrap();
    let mut inbox = inbox();
    let post = inbox.post();
    let (give, given) = mpsc::channel();
    let poster = thread::spawn(move || {
        for ticket in given {
            post.deliver(ticket, 0);
        }
    });
    for _ in 0..20_000 {
        give.send(inbox.expect(3)).unwrap();
        while inbox.next_result().is_none() {
            if inbox.listen(&mut ring) {
                wait_rung(&mut ring, &mut inbox);
            }
        }
    }
    drop(give);
    poster.join().unwrap();
    assert!(ring.drain(LIMIT, None));
}

#[test]
fn an_end_waits_for_what_is_under_way_elsewhere_for_a_while() {
    let mut inbox = inbox();
    assert!(inbox.quiesce(Duration::ZERO));
    let (first, second) = (inbox.expect(0), inbox.expect(1));
    let post = inbox.post();
    post.deliver(first, 0);
    assert!(!inbox.quiesce(Duration::from_millis(20)));
    let poster = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        post.deliver(second, 0);
        // Later than it is waited for: without effect.
        post
    });
    assert!(inbox.quiesce(LIMIT));
    drop(inbox);
    poster.join().unwrap().deliver(second, 0);
}
