//! What the event loop promises.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use super::*;

const LONG: Duration = Duration::from_secs(20);

/// A descriptor that can be read.
fn readable() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::io::write(&theirs, b"x").unwrap();
    (ours, theirs)
}

fn events() -> &'static EventLoop {
    EventLoop::get().unwrap()
}

#[test]
fn a_readable_descriptor_is_reported_until_it_is_read() {
    let (ours, _theirs) = readable();
    let (report, reports) = mpsc::channel();
    let mut left = 3;
    let registration = events().watch(ours, move |stream| {
        left -= 1;
        if left == 0 {
            rustix::io::read(stream, &mut [0; 1]).unwrap();
        }
        report.send(left).unwrap();
        Then::Watch
    });
    for left in [2, 1, 0] {
        assert_eq!(reports.recv_timeout(LONG), Ok(left));
    }
    let more = reports.recv_timeout(Duration::from_millis(50));
    assert_eq!(more, Err(mpsc::RecvTimeoutError::Timeout));
    drop(registration);
    let end = reports.recv_timeout(LONG);
    assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
}

#[test]
fn the_end_of_a_registration_waits_for_a_callback_that_runs() {
    let (ours, _theirs) = readable();
    let (begun, begins) = mpsc::channel();
    let done = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&done);
    let registration = events().watch(ours, move |_| {
        begun.send(()).unwrap();
        thread::sleep(Duration::from_millis(50));
        done.fetch_add(1, Ordering::SeqCst);
        Then::Watch
    });
    begins.recv_timeout(LONG).unwrap();
    drop(registration);
    let calls = seen.load(Ordering::SeqCst);
    assert!(calls > 0);
    assert_eq!(Arc::strong_count(&seen), 1, "the callback is dropped");
    thread::sleep(Duration::from_millis(20));
    assert_eq!(seen.load(Ordering::SeqCst), calls);
}

#[test]
fn a_callback_may_end_its_own_registration() {
    let (ours, theirs) = readable();
    let own = Arc::new(Mutex::new(None));
    let (report, reports) = mpsc::channel();
    let registration = events().watch(ours, {
        let own = Arc::clone(&own);
        move |_| {
            if let Some(registration) = own.lock().unwrap().take() {
                drop::<Registration>(registration);
                report.send(()).unwrap();
            }
            Then::Watch
        }
    });
    *own.lock().unwrap() = Some(registration.unwrap());
    reports.recv_timeout(LONG).unwrap();
    // Its descriptor has been closed.
    let end = reports.recv_timeout(LONG);
    assert_eq!(end, Err(mpsc::RecvTimeoutError::Disconnected));
    assert_eq!(
        rustix::io::write(&theirs, b"x"),
        Err(rustix::io::Errno::PIPE)
    );
}

#[test]
fn a_callback_that_pauses_or_panics_is_called_again_later() {
    for panics in [false, true] {
        let (ours, _theirs) = readable();
        let (report, reports) = mpsc::channel();
        let mut first = true;
        let registration = events().watch(ours, move |_| {
            report.send(Instant::now()).unwrap();
            assert!(!std::mem::take(&mut first) || !panics, "a bug, on purpose");
            Then::Pause(Duration::from_millis(60))
        });
        let first = reports.recv_timeout(LONG).unwrap();
        let second = reports.recv_timeout(LONG).unwrap();
        assert!(
            second - first >= Duration::from_millis(60),
            "it was left alone"
        );
        drop(registration);
    }
}

#[test]
fn timers_are_called_in_their_order() {
    let (report, reports) = mpsc::channel();
    let alarms = [60, 20, 40].map(|delay| {
        let report = report.clone();
        let call = move || report.send(delay).unwrap();
        events().call_after(Duration::from_millis(delay), call)
    });
    for delay in [20, 40, 60] {
        assert_eq!(reports.recv_timeout(LONG), Ok(delay));
    }
    drop(alarms);
}

#[test]
fn a_timer_that_is_dropped_is_forgotten_at_once() {
    let (report, reports) = mpsc::channel::<()>();
    let alarm = events().call_after(LONG, move || drop(report));
    assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Empty));
    drop(alarm);
    assert_eq!(reports.try_recv(), Err(mpsc::TryRecvError::Disconnected));
}
