//! Clients of the vhost door that behave badly in every state of the handshake and behind it, and leave:
//! nothing of them stays, and the client of another export goes on.

mod bystander;
mod messages;

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use testkit::proc::Holdings;
use testkit::random::Random;
use testkit::vhost::raw::{self, FrontendReq, HEADER_BYTES, pair};
use testkit::wait::wait_for;

use self::bystander::Bystander;
use self::messages::{Message, Passes, Things, VRINGS, changes, handshake, offer_reads};
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[
    test!(
        clients_that_behave_badly_in_any_state_leave_nothing_and_disturb_nobody,
        |cx| { leave_nothing(cx, 12) }
    )
    .limit_s(200),
    test!(
        a_thousand_clients_that_behave_badly_in_each_state_leave_nothing_and_disturb_nobody,
        |cx| { leave_nothing(cx, 1000) }
    )
    .limit_s(3000)
    .full(),
];

/// How a client behaves in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Leaving {
    AtOnce,
    Silent,
    HalfAHeader,
    HalfABody,
    WithoutItsDescriptor,
    WithAnOddDescriptor,
    WithTooManyDescriptors,
    WithNoise,
    WithAnEndlessMessage,
    /// It asks, and reads no answer.
    Deaf,
    /// It says the same again and again, as fast as it can.
    Flooding,
    /// It takes memory away that is in use, and gives it back.
    ChangingItsMemory,
}

const LEAVINGS: [Leaving; 12] = [
    Leaving::AtOnce,
    Leaving::Silent,
    Leaving::HalfAHeader,
    Leaving::HalfABody,
    Leaving::WithoutItsDescriptor,
    Leaving::WithAnOddDescriptor,
    Leaving::WithTooManyDescriptors,
    Leaving::WithNoise,
    Leaving::WithAnEndlessMessage,
    Leaving::Deaf,
    Leaving::Flooding,
    Leaving::ChangingItsMemory,
];

struct Client {
    stream: UnixStream,
    features: u64,
    protocol: u64,
}

impl Client {
    /// Connects and asks for features; again as long as the client before still has the disk.
    fn connect(socket: &Path, patience: Duration) -> Result<Self> {
        wait_for("the server takes a client", patience, || {
            let stream = UnixStream::connect(socket)
                .with_context(|| format!("cannot connect to {}", socket.display()))?;
            stream.set_read_timeout(Some(patience))?;
            stream.set_write_timeout(Some(patience))?;
            let mut client = Self {
                stream,
                features: 0,
                protocol: 0,
            };
            Ok(client.introduce().is_ok().then_some(client))
        })
    }

    fn introduce(&mut self) -> Result<()> {
        self.features = self.ask(FrontendReq::GET_FEATURES, &[])?;
        self.protocol = self.ask(FrontendReq::GET_PROTOCOL_FEATURES, &[])?;
        Ok(())
    }

    /// Sends a message without descriptors; the first word of the answer.
    fn ask(&self, request: FrontendReq, words: &[u64]) -> Result<u64> {
        let message = Message::new(request, words, Passes::Nothing);
        (&self.stream).write_all(&message.bytes())?;
        raw::answer(&self.stream, request as u32)
    }

    /// Sends bytes and descriptors in one piece. A server that has hung up is no error: it may
    /// have had enough.
    fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
        let gone = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
        match raw::send(&self.stream, bytes, descriptors) {
            Err(error) if !gone.contains(&error.kind()) => Err(error).context("cannot send"),
            _ => Ok(()),
        }
    }

    fn say(&self, message: &Message, things: &Things) -> Result<()> {
        self.send(&message.bytes(), &message.descriptors(things))
    }

    /// Leaves, maybe with a part of `next` or something like it.
    fn leave(
        self,
        how: Leaving,
        next: &Message,
        things: &Things,
        random: &mut Random,
    ) -> Result<()> {
        let bytes = next.bytes();
        let some =
            |random: &mut Random, from: usize, to: usize| from + random.index((to - from).max(1));
        match how {
            Leaving::AtOnce => {}
            Leaving::Silent => thread::sleep(Duration::from_millis(random.below(8))),
            Leaving::HalfAHeader => {
                let end = some(random, 1, HEADER_BYTES);
                self.send(&bytes[..end], &next.descriptors(things))?;
            }
            Leaving::HalfABody => {
                let end = some(random, HEADER_BYTES, bytes.len());
                self.send(&bytes[..end], &next.descriptors(things))?;
            }
            Leaving::WithoutItsDescriptor => self.send(&bytes, &[])?,
            Leaving::WithAnOddDescriptor => {
                let odd = &things.odd[some(random, 0, things.odd.len())];
                self.send(&bytes, &[odd.as_fd()])?;
            }
            Leaving::WithTooManyDescriptors => {
                let count = some(random, 2, 32);
                self.send(&bytes, &vec![things.memory.as_fd(); count])?;
            }
            Leaving::WithNoise => {
                let count = some(random, 1, 200);
                self.send(&random.bytes(count), &[things.bell.as_fd()])?;
            }
            Leaving::WithAnEndlessMessage => {
                let mut header = bytes;
                header[8..HEADER_BYTES].copy_from_slice(&u32::MAX.to_le_bytes());
                self.send(&header, &next.descriptors(things))?;
            }
            Leaving::Deaf => {
                let question =
                    Message::new(FrontendReq::GET_FEATURES, &[], Passes::Nothing).bytes();
                self.stream.set_nonblocking(true)?;
                // Until the server reads no more, because nobody reads what it says; or, once it has had
                // enough, no more can be sent.
                while (&self.stream).write_all(&question).is_ok() {}
                self.stay(random);
            }
            Leaving::Flooding => {
                for _ in 0..some(random, 20, 200) {
                    self.say(next, things)?;
                }
            }
            Leaving::ChangingItsMemory => {
                for change in changes() {
                    self.say(&change, things)?;
                    if random.below(4) == 0 {
                        self.stay(random);
                    }
                }
            }
        }
        // Half of them hang up without a pause.
        if random.below(2) == 0 {
            self.stay(random);
        }
        Ok(())
    }

    fn stay(&self, random: &mut Random) {
        thread::sleep(Duration::from_micros(random.below(2000)));
    }
}

/// How far a client gets before it behaves badly: so many messages, or all and then requests.
fn states() -> usize {
    handshake(0, 0).len() + 2
}

/// Clients come, get as far as `state`, behave badly and leave.
fn come_and_go(
    cx: &Context,
    socket: &Path,
    state: usize,
    clients: u64,
    random: &mut Random,
    left: &mut BTreeMap<Leaving, u64>,
) -> Result<()> {
    let mut things = Things::new()?;
    for number in 0..clients {
        let client = Client::connect(socket, cx.patience(20))?;
        let messages = handshake(client.features, client.protocol);
        let steps = state.min(messages.len());
        if state > messages.len() {
            // Of its own, and new: the one before may still be in use.
            things = Things::new()?;
        }
        for message in &messages[..steps] {
            client.say(message, &things)?;
        }
        if state > messages.len() {
            offer_reads(&things)?;
        }
        // Half of them wait until the server has done all that, the others do not.
        if random.below(2) == 0 {
            let features = client.ask(FrontendReq::GET_FEATURES, &[]);
            let features = features.with_context(|| format!("client {number}, {steps} steps"))?;
            ensure!(features == client.features, "the features change");
        }
        // After the last message comes the first, once more.
        let next = messages.get(steps).unwrap_or(&messages[0]);
        let how = LEAVINGS[random.index(LEAVINGS.len())];
        client.leave(how, next, &things, random)?;
        *left.entry(how).or_default() += 1;
    }
    Ok(())
}

/// A client of good manners is served from the first to the last message.
fn a_whole_handshake_works(cx: &Context, socket: &Path) -> Result<()> {
    let things = Things::new()?;
    let client = Client::connect(socket, cx.patience(20))?;
    for message in handshake(client.features, client.protocol) {
        client.say(&message, &things)?;
    }
    for vring in 0..VRINGS {
        // Answered when the queue's thread has stopped the vring.
        let base = client.ask(FrontendReq::GET_VRING_BASE, &[pair(vring, 0)])?;
        ensure!(base == pair(vring, 0), "vring {vring} stopped at {base:#x}");
    }
    let mut rest = Vec::new();
    client.stream.shutdown(std::net::Shutdown::Write)?;
    (&client.stream).read_to_end(&mut rest)?;
    ensure!(rest.is_empty(), "the server said more: {rest:?}");
    Ok(())
}

fn leave_nothing(cx: &Context, clients: u64) -> Result<()> {
    let socket = |name: &str| cx.run_dir().join(format!("exports/{name}/vhost-user-blk"));
    let server = cx
        .serve()
        .ublk("no")
        .args(["--queues", "2"])
        .arg("disk=fault:any=delay1;mem:64M")
        .arg("other=mem:64M")
        .start()?;
    let threads = Holdings::of(server.pid())?.threads;
    let disk = socket("disk");
    let mut random = Random(clients);
    let mut left = BTreeMap::new();
    // The first ones make what stays, such as the heaps that threads share: there are more and more of
    // them, up to a limit. What leaks has none.
    for state in 0..states() {
        let half = clients.div_ceil(2);
        come_and_go(cx, &disk, state, half, &mut random, &mut left)?;
    }
    left.clear();
    let (first, _) = Bystander::start(&socket("other"))?.stop()?;
    let before = Holdings::at_rest(server.pid(), threads, cx.patience(20))?;
    let bystander = Bystander::start(&socket("other"))?;
    for state in 0..states() {
        come_and_go(cx, &disk, state, clients, &mut random, &mut left)?;
    }
    let (requests, worst) = bystander.stop()?;
    let after = Holdings::at_rest(server.pid(), threads, cx.patience(20))?;
    println!(
        "{clients} clients in each of {} states: {before:?}, then {after:?}",
        states()
    );
    println!("left: {left:?}");
    println!("beside them: {requests} reads of another export, the longest took {worst:?}");
    ensure!(left.len() == LEAVINGS.len(), "ways to leave: {left:?}");
    ensure!(first + requests > 100, "the other export was not used");
    after.are_no_more_than(&before)?;
    a_whole_handshake_works(cx, &disk)?;
    server.stop().map(drop)
}
