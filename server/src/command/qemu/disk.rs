//! A disk of a guest: what the user wrote, and QEMU's options for it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use upgrade_proto::{Connection, Route};

use super::memory::Bus;
use super::words::pairs;
use crate::config::commas::escape;
use crate::export::upgrade::SERVICE;

/// `DEVICE[,key=value…]`: a block device, and properties for the guest's disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// The block device.
    pub path: PathBuf,
    /// Properties of QEMU's `-device`, in the user's order.
    pub properties: Vec<(String, String)>,
}

impl std::str::FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = pairs(text, "path").into_iter();
        let path = match parts.next() {
            Some((key, path)) if key == "path" && !path.is_empty() => path,
            _ => return Err("starts with the path of a block device (a comma in it is ,,)".into()),
        };
        let properties: Vec<_> = parts.collect();
        for (key, _) in &properties {
            let why = match key.as_str() {
                "serial" => "is set by the server: give it to ublkup serve (SPEC,serial=…)",
                "chardev" | "drive" | "driver" => "is set by the launcher",
                _ => continue,
            };
            return Err(format!("'{key}' {why}"));
        }
        let path = path.into();
        Ok(Self { path, properties })
    }
}

/// Where the guest's requests go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the service, at this socket address.
    Service {
        /// What QEMU's chardev connects to.
        address: String,
    },
    /// Through the block device.
    Block {
        /// What QEMU opens.
        filename: String,
        /// Whether the disk is read-only.
        read_only: bool,
    },
}

/// QEMU's pause before the first attempt to connect again to a server that went away, and between later ones: what a guest
/// notices of a planned restart is this and about as much again.
pub const RECONNECT_MS: u32 = 10;

/// The socket's path in the registry, where the service was found there; `None` where the kernel knows it.
///
/// # Errors
///
/// When another user could lead QEMU elsewhere by the path, or it is not UTF-8, which QEMU's options are.
pub fn registry_entry(connection: &Connection) -> Result<Option<String>> {
    match connection.route() {
        Route::Kernel => Ok(None),
        Route::Registry => {
            let entry = connection.lasting_path()?;
            let entry = entry.as_deref().and_then(Path::to_str);
            let entry = entry.context("the registry's path is not UTF-8")?;
            Ok(Some(entry.to_owned()))
        }
    }
}

/// What QEMU's chardev connects to, now and whenever the server comes back: the [registry's
/// entry](registry_entry), or else the address of the service behind `fd`, the descriptor of the block device in
/// QEMU's process.
#[must_use]
pub fn service_address(entry: Option<&str>, fd: i32) -> String {
    entry.map_or_else(|| fd_address(fd), str::to_owned)
}

fn fd_address(fd: i32) -> String {
    format!("/dev/self/fd/{fd}/{SERVICE}")
}

/// QEMU's name for a virtio disk.
#[must_use]
pub fn driver(bus: Bus, target: &Target) -> &'static str {
    match (target, bus) {
        (Target::Service { .. }, Bus::Pci) => "vhost-user-blk-pci",
        (Target::Service { .. }, Bus::Mmio) => "vhost-user-blk",
        (Target::Block { .. }, Bus::Pci) => "virtio-blk-pci",
        (Target::Block { .. }, Bus::Mmio) => "virtio-blk-device",
    }
}

impl Disk {
    /// QEMU's options for this disk, the `index`th.
    #[must_use]
    pub fn options(&self, index: usize, bus: Bus, target: &Target) -> Vec<String> {
        let name = format!("ublkup-{index}");
        let (option, host, node) = match target {
            Target::Service { address } => {
                let path = escape(address);
                let socket = format!("socket,id={name},path={path},reconnect-ms={RECONNECT_MS}");
                ("-chardev", socket, "chardev")
            }
            Target::Block {
                filename,
                read_only,
            } => {
                let filename = escape(filename);
                let read_only = if *read_only { "on" } else { "off" };
                let device = format!(
                    "driver=host_device,node-name={name},filename={filename},cache.direct=on,\
                     cache.no-flush=off,discard=unmap,read-only={read_only}"
                );
                ("-blockdev", device, "drive")
            }
        };
        let mut device = format!("{},{node}={name}", driver(bus, target));
        if !self.properties.iter().any(|(key, _)| key == "id") {
            device.push_str(&format!(",id={name}"));
        }
        for (key, value) in &self.properties {
            device.push_str(&format!(",{key}={}", escape(value)));
        }
        vec![option.into(), host, "-device".into(), device]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str, bus: Bus, target: &Target) -> String {
        let disk: Disk = text.parse().unwrap();
        disk.options(1, bus, target).join(" ")
    }

    #[test]
    fn a_disk_becomes_a_chardev_and_a_device() {
        let target = Target::Service {
            address: fd_address(9),
        };
        let chardev =
            "-chardev socket,id=ublkup-1,path=/dev/self/fd/9/vhost-user-blk,reconnect-ms=10";
        for (disk, bus, device) in [
            (
                "/dev/ublkb0",
                Bus::Pci,
                "vhost-user-blk-pci,chardev=ublkup-1,id=ublkup-1",
            ),
            (
                "/dev/ublkb0,id=root,bootindex=1",
                Bus::Mmio,
                "vhost-user-blk,chardev=ublkup-1,id=root,bootindex=1",
            ),
        ] {
            assert_eq!(
                options(disk, bus, &target),
                format!("{chardev} -device {device}")
            );
        }
        let target = Target::Service {
            address: "/run/a,b".into(),
        };
        assert!(options("/dev/ublkb0", Bus::Pci, &target).contains("path=/run/a,,b,"));
    }

    #[test]
    fn a_disk_without_service_becomes_a_block_node_on_the_same_descriptor() {
        let target = Target::Block {
            filename: "/proc/self/fd/9".into(),
            read_only: true,
        };
        assert_eq!(
            options("/dev/ublkb0,num-queues=2", Bus::Pci, &target),
            "-blockdev driver=host_device,node-name=ublkup-1,filename=/proc/self/fd/9,\
             cache.direct=on,cache.no-flush=off,discard=unmap,read-only=on \
             -device virtio-blk-pci,drive=ublkup-1,id=ublkup-1,num-queues=2"
        );
        assert!(options("/dev/ublkb0", Bus::Mmio, &target).contains("-device virtio-blk-device,"));
    }

    #[test]
    fn properties_that_are_not_the_users_are_refused() {
        for (text, says) in [
            ("/dev/ublkb0,serial=x", "ublkup serve"),
            ("/dev/ublkb0,drive=x", "launcher"),
            ("", "path"),
            (",id=x", "path"),
        ] {
            let error = text.parse::<Disk>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
        let disk: Disk = "/dev/a,,b".parse().unwrap();
        assert_eq!(disk.path, PathBuf::from("/dev/a,b"));
    }
}
