//! The admin socket of each export: one line of JSON asks, one line answers.
//!
//! `{"command":"stat"}` → [`ExportStatus`]; `{"command":"stop"}` → `{"stopped":true}` once the
//! export is drained and gone; `{"command":"leave"}` → `{"left":true}` once it is another server's.
//! Anything else → `{"error":"…"}`.

mod client;
mod line;
mod protocol;
mod server;
#[cfg(feature = "testing")]
pub mod testing;

pub use client::{leave, resize, stat, stop};
pub use protocol::{
    Command, ExportStatus, OPEN_INTERVAL, OPEN_LIMIT, RefusalStatus, Resized, SessionStatus,
    UblkStatus, VhostStatus,
};
pub use server::{Listening, Service, serve};

#[cfg(test)]
mod tests;
