//! Helpers for test bodies: commands, images, fio, the server.

pub mod boot_sector;
pub mod fio;
pub mod images;
pub mod load;
pub mod qmp;
pub mod server;
pub mod shell;
pub mod ublk_control;
