//! Servers that are killed while a client writes: the one in front, and the one behind it.

use std::time::Instant;

use testkit::sandbox::Sandbox;
use testkit::server::Server;

use crate::common::*;
use crate::recorded::Client;
use crate::rounds::*;
use crate::serve;

/// The server behind: export `p`, which does not wait for a client that has died.
fn serve_behind(lab: &Sandbox) -> Server {
    let spec = format!("p=file:{}", lab.path("disk.img").display());
    lab.serve(&["--ublk", "no", "--reconnect-grace", "0", &spec])
}

struct Pair {
    behind: Sandbox,
    front: Sandbox,
}

impl Pair {
    fn new() -> Self {
        let behind = sandbox();
        drop(behind.image("disk.img", 16 << 20));
        Self {
            behind,
            front: sandbox(),
        }
    }

    fn serve_front(&self) -> Server {
        serve(
            &self.front,
            &self.behind.path("run/exports/p/vhost-user-blk"),
        )
    }

    /// Nothing is left of either.
    fn end(&self, client: Client, front: Server, behind: Server) {
        drop(client);
        front.stop().unwrap();
        behind.stop().unwrap();
        self.front.is_clean();
        self.behind.is_clean();
    }
}

#[test]
fn a_client_loses_nothing_when_the_server_behind_is_killed_again_and_again() {
    let pair = Pair::new();
    let mut behind = serve_behind(&pair.behind);
    let front = pair.serve_front();
    let mut client = client(&pair.front, USUAL);
    let mut pauses = Vec::new();
    for round in 1..=kills("VHOST_USER_KILLS") {
        let ended = write(&mut client, round);
        behind.kill().unwrap();
        let died = Instant::now();
        behind = serve_behind(&pair.behind);
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    pair.end(client, front, behind);
}

#[test]
fn the_server_in_front_hands_over_to_another_one() {
    let pair = Pair::new();
    let behind = serve_behind(&pair.behind);
    let begun = (pair.serve_front(), client(&pair.front, USUAL));
    let socket = pair.behind.path("run/exports/p/vhost-user-blk");
    let spec = format!("d=vhost-user:{}", socket.display());
    let take_over = || pair.front.serve(&["--take-over", "--ublk", "no", &spec]);
    let (next, client) = hand_over(&pair.front, begun, take_over);
    pair.end(client, next, behind);
}

#[test]
fn a_client_loses_nothing_when_the_server_in_front_is_killed_again_and_again() {
    let pair = Pair::new();
    let behind = serve_behind(&pair.behind);
    let begun = (pair.serve_front(), client(&pair.front, USUAL));
    let kills = (&pair.front, "VHOST_USER_KILLS");
    let (front, client) = kill_servers(kills, begun, || pair.serve_front());
    pair.end(client, front, behind);
}
