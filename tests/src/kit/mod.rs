//! Helpers for test bodies, beside those of `testkit`: fio, small guests, sysfs.

pub mod beside;
pub mod boot_sector;
pub mod ceph;
pub mod fio;
pub mod libvirt;
pub mod load;
pub mod sysfs;
