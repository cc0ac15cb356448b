//! Helpers for test bodies, beside those of `testkit`: fio, small guests.

pub mod boot_sector;
pub mod fio;
pub mod load;
