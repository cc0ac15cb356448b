use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;
use crate::door::ownership::OwnershipState;
use crate::engine::mailbox::Mailbox;
use crate::request::small_disk;

#[test]
fn a_handler_that_panics_leaves_no_thread_and_the_disk_to_nobody_before() {
    let ownership = Ownership::new("test", false, Duration::ZERO, None);
    ownership.open(None);
    let (sender, seen) = mpsc::channel();
    let spawn: Spawn = Box::new({
        let ownership = Arc::clone(&ownership);
        move |_| {
            let (mail, mut mailbox) = Mailbox::<Command>::new()?;
            let (ownership, sender) = (Arc::clone(&ownership), sender.clone());
            let thread = std::thread::spawn(move || {
                while !matches!(mailbox.take(), Some(Command::Exit)) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // Long enough for whoever does not wait.
                std::thread::sleep(Duration::from_millis(50));
                sender.send(ownership.state()).unwrap();
            });
            Ok(QueueHandle { mail, thread })
        }
    });
    let (_client, stream) = UnixStream::pair().unwrap();
    let connection = Arc::new(Connection::new(
        "test",
        1,
        None,
        small_disk(1 << 20),
        stream,
    ));
    let sizes = Sizes {
        queues: 1,
        threads: 1,
    };
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut session = Session::new(connection, sizes, spawn, Arc::clone(&ownership));
        let client = Client {
            name: "a client".into(),
            gone: Arc::new(|| false),
            identity: Identity::default(),
        };
        session.lease = Some(ownership.take(client).unwrap());
        session.threads.insert(0, (session.spawn)(0).unwrap());
        panic!("as a handler might");
    }));
    assert!(panicked.is_err());
    assert_eq!(seen.try_recv(), Ok(OwnershipState::Draining));
    assert_eq!(ownership.state(), OwnershipState::Free);
}
