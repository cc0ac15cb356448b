//! A host of libvirt: a stock libvirtd from the packages of this release, in namespaces of its own. Its QEMU runs as
//! libvirt's user. Nothing is installed on the machine.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result};
use testkit::process;
use testkit::shell::{Shell, last_lines};
use testkit::wait::until;

use crate::packages::unpacked::LIBVIRT;
use crate::test::Context;

/// The group `kvm` of a host, which QEMU's user is in.
pub const KVM_GROUP: u32 = 64057;

/// Makes the namespaces.
const ENTER: &str = include_str!("libvirt.sh");

/// A host that ends with this value, and its guests with it.
pub struct LibvirtHost {
    daemon: Child,
    /// What is /run for it.
    pub run: PathBuf,
}

impl LibvirtHost {
    /// Starts it. The servers have the runtime directory `servers`; `shared` is a directory of several hosts.
    pub fn start(cx: &Context, name: &str, servers: &Path, shared: &Path) -> Result<Self> {
        let packages = LIBVIRT.dir()?;
        let run = cx.scratch().join(format!("{name}.host"));
        for (dir, mode) in [
            (&run, 0o755),
            (&servers.into(), 0o755),
            (&shared.into(), 0o1777),
        ] {
            fs::create_dir_all(dir)?;
            fs::set_permissions(dir, Permissions::from_mode(mode))?;
        }
        let log = cx.scratch().join(format!("{name}.libvirtd.log"));
        let output = File::create(&log)?;
        let mut daemon = Command::new("unshare");
        daemon
            .args(["--mount", "--pid", "--net", "--fork", "--kill-child"])
            .args(["sh", "-c", ENTER, "libvirt.sh"])
            .args([&packages, &run, servers, shared])
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let host = Self {
            daemon: process::spawn_group(&mut daemon)?,
            run,
        };
        until("libvirtd answers", cx.patience(60), || {
            Ok(host.virsh(&["version"]).run().is_ok())
        })
        .with_context(|| last_lines(&fs::read_to_string(&log).unwrap_or_default(), 20))?;
        Ok(host)
    }

    /// The address of its daemon, for who sees its files from outside.
    pub fn uri(&self) -> String {
        format!(
            "qemu+unix:///system?socket={}/libvirt/libvirt-sock",
            self.run.display()
        )
    }

    /// A command for its daemon.
    pub fn virsh(&self, args: &[&str]) -> Shell {
        Shell::new("virsh")
            .args(["-q", "-c", &self.uri()])
            .args(args)
    }
}

impl Drop for LibvirtHost {
    fn drop(&mut self) {
        process::kill_group(&mut self.daemon);
    }
}
