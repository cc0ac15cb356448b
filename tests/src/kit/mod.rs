//! Helpers for test bodies: commands, images, fio, the server.

pub mod fio;
pub mod images;
pub mod server;
pub mod shell;
