//! Servers that are killed while their client writes.

use crate::common::*;
use crate::rounds::*;
use crate::{Image, PLAIN, serve};

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_client_loses_nothing_when_its_server_is_killed_again_and_again() {
    let image = Image::new("killed", "64M");
    let lab = sandbox();
    let begun = (serve(&lab, &image), client(&lab, PLAIN));
    let serve = || serve(&lab, &image);
    let (server, client) = kill_servers((&lab, "RBD_KILLS"), begun, serve);
    drop(client);
    server.stop().unwrap();
    lab.is_clean();
}
