//! Servers that are killed while their client writes.

use std::time::Instant;

use crate::common::*;
use crate::recorded::Client;
use crate::rounds::*;
use crate::{Image, PLAIN, serve};

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_client_loses_nothing_when_its_server_is_killed_again_and_again() {
    let image = Image::new("killed", "64M");
    let lab = sandbox();
    let mut server = serve(&lab, &image);
    let mut client = Client::connect(lab.connect("d"), PLAIN);
    assert!(client.start());
    let mut pauses = Vec::new();
    for round in 1..=kills("RBD_KILLS") {
        let ended = write(&mut client, round);
        server.kill().unwrap();
        let died = Instant::now();
        server = serve(&lab, &image);
        client = client.reconnect(|| lab.connect("d"));
        assert!(client.start());
        finish(&mut client, ended);
        pauses.push(died.elapsed());
        check(&mut client, round);
    }
    tell(&mut pauses);
    server.stop().unwrap();
    lab.is_clean();
}
