//! The disk of another vhost-user server as the storage.
//!
//! The other server is one of three: a small one in this process, on the crate `vhost-user-backend`, which misbehaves as
//! a test wants it; this program; `qemu-storage-daemon`, where it is installed.

#![allow(clippy::unwrap_used, reason = "in a test a panic is the report")]

mod common;

#[path = "vhost_user_storage/data.rs"]
mod data;
#[path = "vhost_user_storage/gone.rs"]
mod gone;
#[path = "vhost_user_storage/hostile.rs"]
mod hostile;
#[path = "vhost_user_storage/killed.rs"]
mod killed;
#[path = "vhost_user_storage/others.rs"]
mod others;
#[path = "vhost_user_storage/peer.rs"]
mod peer;
#[path = "common/recorded.rs"]
mod recorded;
#[path = "common/rounds.rs"]
mod rounds;

use std::path::Path;

use testkit::sandbox::Sandbox;
use testkit::server::Server;
use ublkup::request::Serial;
use ublkup::storage::{VhostUser, VhostUserOptions};

/// A server in front of the one at a socket, without a block device: export `d`.
fn serve(lab: &Sandbox, socket: &Path) -> Server {
    let spec = format!("d=vhost-user:{}", socket.display());
    lab.serve(&["--ublk", "no", &spec])
}

/// A storage in this process, for what only it tells.
fn open(socket: &Path) -> VhostUser {
    VhostUser::open(&options(socket)).unwrap()
}

fn options(socket: &Path) -> VhostUserOptions {
    VhostUserOptions {
        export: "test".into(),
        socket: socket.to_owned(),
        locks: None,
        read_only: false,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        queues: 2,
    }
}

/// The disk's size as `stat` tells it.
fn size_bytes(lab: &Sandbox) -> u64 {
    stat(lab)["size_bytes"].as_u64().unwrap()
}

fn stat(lab: &Sandbox) -> serde_json::Value {
    serde_json::from_str(&lab.ok(&["stat", "d", "--json"])).unwrap()
}
