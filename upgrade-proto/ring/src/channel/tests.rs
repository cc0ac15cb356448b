//! Messages and notifications on a control channel.

use super::*;

fn pair() -> (ControlChannel, ControlChannel) {
    let (a, b) = UnixStream::pair().expect("a pair");
    (ControlChannel::new(a), ControlChannel::new(b))
}

#[test]
fn a_message_arrives_with_its_descriptor() {
    let (a, b) = pair();
    assert!(matches!(b.receive(), Received::Nothing));
    let (read, _write) = std::io::pipe().expect("a pipe");
    assert!(a.send(Message::Offer(65536), Some(read.as_fd())));
    assert!(a.send(Message::Switch, None));
    assert!(matches!(
        b.receive(),
        Received::Message(Message::Offer(65536), Some(_))
    ));
    assert!(matches!(
        b.receive(),
        Received::Message(Message::Switch, None)
    ));
    drop(a);
    assert!(matches!(b.receive(), Received::Gone));
    assert!(!b.send(Message::Ready, None) && !b.notify() && !b.drain());
}

#[test]
fn a_malformed_message_is_a_peer_that_is_gone() {
    let good = Message::Offer(4096).encode();
    assert_eq!(Message::decode(&good), Some(Message::Offer(4096)));
    for place in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good;
            bad[place] ^= 1 << bit;
            let decoded = Message::decode(&bad);
            let size_alone = (16..24).contains(&place);
            assert_eq!(decoded.is_some(), size_alone, "byte {place} bit {bit}");
        }
    }
    let (a, b) = pair();
    send(&a, &good[..31], SendFlags::empty()).expect("sent");
    assert!(matches!(b.receive(), Received::Gone));
}

#[test]
fn notifications_that_are_not_read_never_block() {
    let (a, b) = pair();
    for _ in 0..100_000 {
        assert!(a.notify());
    }
    while matches!(b.receive(), Received::Gone) {
        assert!(b.drain());
    }
    assert!(b.drain());
}

#[test]
fn a_flood_of_notifications_does_not_hold_the_receiver() {
    let (a, b) = pair();
    let noise = [1; 4096];
    let mut sent = 0;
    while let Ok(count) = send(&a, &noise, SendFlags::DONTWAIT) {
        sent += count;
    }
    assert!(sent > 3 * 64 * DRAINS_MAX as usize, "{sent}");
    assert!(b.drain());
    assert!(matches!(b.receive(), Received::Gone), "all of it was taken");
    drop(a);
    let mut drains = 1;
    while b.drain() {
        drains += 1;
    }
    assert!(drains > 1, "the end is seen after the flood");
}
