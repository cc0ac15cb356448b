//! The admin sockets of a server and of its exports: one line of JSON asks, one line answers, or many to `events`.
//! docs/admin.md has the protocol.

mod client;
mod protocol;
mod server;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;

pub use client::{
    Help, Watch, add, leave, resize, server, server_process, set, snapshot, stat, stop, watch,
};
pub use protocol::{
    AllStatus, Command, ExportStatus, HandedOver, NewExport, OPEN_INTERVAL, OPEN_LIMIT,
    RefusalStatus, Request, Resized, SCHEMA, ServerStatus, SessionStatus, StreamLine, UblkStatus,
    VhostStatus, Wanted,
};
pub use server::{Answerer, Client, Listening, Reply, Service, answer_for, listen_at, serve};

#[cfg(test)]
mod tests;
