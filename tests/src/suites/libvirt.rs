//! Guests of a stock libvirtd, with the domain of `qemu-config/` as it is shipped.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use testkit::server::{Serve, Server};
use testkit::shell::last_lines;
use testkit::wait::until;

use crate::kernel::Kernel;
use crate::kit::libvirt::{KVM_GROUP, LibvirtHost};
use crate::kit::load;
use crate::test::{Context, Test};
use crate::{skip, test};

/// On this machine.
pub const TESTS: &[Test] = &[
    test!(a_guest_outlives_killed_servers_and_take_overs).limit_s(600),
    test!(libvirt_pauses_saves_resets_and_plugs).limit_s(600),
    test!(a_guest_moves_between_two_hosts).limit_s(600),
];

/// The domain of `qemu-config/libvirt.xml`.
const DOMAIN: &str = "ublkup-guest";

/// Its disk, and the one with the root of the guest of [`load`], which only reads it.
const EXPORTS: [&str; 2] = ["disk", "root"];

/// A host with a server and its guest's domain.
struct Host<'a> {
    cx: &'a Context,
    name: &'static str,
    libvirt: LibvirtHost,
    images: [PathBuf; 2],
}

impl<'a> Host<'a> {
    fn start(cx: &'a Context, name: &'static str, images: &[PathBuf; 2]) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            skip!("needs root, for namespaces with libvirt's users");
        }
        let servers = cx.scratch().join(format!("{name}.servers"));
        let libvirt = LibvirtHost::start(cx, name, &servers, &cx.scratch().join("shared"))?;
        fs::copy(cx.paths.kernel(Kernel::X86)?, libvirt.run.join("kernel"))?;
        Ok(Self {
            cx,
            name,
            libvirt,
            images: images.clone(),
        })
    }

    fn servers(&self) -> PathBuf {
        self.cx.scratch().join(format!("{}.servers", self.name))
    }

    /// The server of both disks, as operations.md says for libvirt.
    fn serve(&self) -> Serve {
        let [disk, root] = &self.images;
        self.cx
            .serve()
            .env("UBLKUP_RUNTIME_DIR", self.servers())
            .ublk("no")
            .arg("--migration")
            .args(["--vhost-socket-group", &KVM_GROUP.to_string()])
            .arg(format!("disk=file:{}", disk.display()))
            .arg(format!("root=file:{},read-only", root.display()))
    }

    /// The shipped domain, on a machine without KVM, with a kernel, the guest's root and its console in a file.
    fn domain(&self) -> Result<String> {
        let shipped = fs::read_to_string(self.cx.paths.repo.join("qemu-config/libvirt.xml"))?;
        let boot = format!(
            "<kernel>/run/kernel</kernel><cmdline>console=ttyS0 panic=-1 tsc=unstable {}</cmdline></os>",
            load::kernel_arguments().join(" ")
        );
        let disk = self.disk(&shipped)?;
        let root = disk
            .replace("exports/disk/", "exports/root/")
            .replace("vda", "vdb");
        let root = root.replace("<boot order='1'/>", "");
        let devices = format!("{root}</devices>");
        let mut domain = shipped;
        for (from, to) in [
            ("<domain type='kvm'>", "<domain type='qemu'>"),
            (
                "<memory unit='GiB'>4</memory>",
                "<memory unit='MiB'>256</memory>",
            ),
            ("</os>", &boot),
            ("</devices>", &devices),
            (
                "<serial type='pty'/>",
                "<serial type='pty'><log file='/run/console' append='on'/></serial>",
            ),
        ] {
            ensure!(
                domain.matches(from).count() == 1,
                "the shipped domain has no {from}"
            );
            domain = domain.replace(from, to);
        }
        Ok(domain)
    }

    /// The shipped domain's disk.
    fn disk(&self, domain: &str) -> Result<String> {
        let (_, rest) = domain.split_once("<disk ").context("no disk")?;
        let (disk, _) = rest.split_once("</disk>").context("no end of the disk")?;
        Ok(format!("<disk {disk}</disk>"))
    }

    fn start_guest(&self) -> Result<()> {
        let file = self.cx.scratch().join("domain.xml");
        fs::write(&file, self.domain()?)?;
        self.virsh(&["define", &file.display().to_string()])?;
        self.virsh(&["start", DOMAIN])?;
        self.wait_rounds(4)
    }

    /// A command of virsh, which succeeds.
    fn virsh(&self, args: &[&str]) -> Result<String> {
        let done = self.libvirt.virsh(args).limit(self.cx.patience(120)).run();
        done.with_context(|| self.console())
    }

    fn state(&self) -> Result<String> {
        Ok(self.virsh(&["domstate", DOMAIN])?.trim().to_owned())
    }

    fn console(&self) -> String {
        let said = fs::read(self.libvirt.run.join("console")).unwrap_or_default();
        String::from_utf8_lossy(&said).into_owned()
    }

    /// Rounds of all threads of the guest on this host.
    fn rounds(&self) -> Result<usize> {
        let said = self.console();
        ensure!(
            !said.contains(load::FAILED),
            "the guest found its disk changed:\n{}",
            last_lines(&said, 10)
        );
        Ok(said.matches(load::ROUND).count())
    }

    fn wait_rounds(&self, more: usize) -> Result<()> {
        let wanted = self.rounds()? + more;
        until("the guest goes on", self.cx.patience(120), || {
            Ok(self.rounds()? >= wanted)
        })
        .with_context(|| last_lines(&self.console(), 20))
    }
}

fn images(cx: &Context) -> Result<[PathBuf; 2]> {
    let [disk, root] = EXPORTS.map(|name| cx.scratch().join(format!("{name}.img")));
    load::make_root(&root, cx.scratch())?;
    fs::File::create(&disk)?.set_len(load::DISK_BYTES)?;
    Ok([disk, root])
}

fn a_guest_outlives_killed_servers_and_take_overs(cx: &Context) -> Result<()> {
    let host = Host::start(cx, "host", &images(cx)?)?;
    let mut server = host.serve().start()?;
    host.start_guest()?;
    for _ in 0..10 {
        server.kill()?;
        server = host.serve().start()?;
        host.wait_rounds(4)?;
        let next = host.serve().arg("--take-over").start()?;
        let (status, log) = server.wait()?;
        ensure!(status.success(), "it ended with {status}:\n{log}");
        server = next;
        host.wait_rounds(4)?;
    }
    host.virsh(&["destroy", DOMAIN])?;
    stopped(server)
}

fn libvirt_pauses_saves_resets_and_plugs(cx: &Context) -> Result<()> {
    let host = Host::start(cx, "host", &images(cx)?)?;
    let server = host.serve().start()?;
    let more = cx.scratch().join("more.img");
    fs::File::create(&more)?.set_len(1 << 20)?;
    let third = (cx.serve())
        .env("UBLKUP_RUNTIME_DIR", host.servers())
        .ublk("no")
        .args(["--vhost-socket-group", &KVM_GROUP.to_string()])
        .arg(format!("more=file:{}", more.display()))
        .start()?;
    host.start_guest()?;

    host.virsh(&["suspend", DOMAIN])?;
    ensure!(host.state()? == "paused");
    host.virsh(&["resume", DOMAIN])?;
    host.wait_rounds(4)?;

    host.virsh(&["save", DOMAIN, "/run/saved"])?;
    ensure!(host.state()? == "shut off");
    host.virsh(&["restore", "/run/saved"])?;
    host.wait_rounds(4)?;

    let boots = |host: &Host<'_>| host.console().matches("Linux version").count();
    let before = boots(&host);
    host.virsh(&["reset", DOMAIN])?;
    until("the guest boots again", cx.patience(120), || {
        Ok(boots(&host) > before)
    })?;
    host.wait_rounds(4)?;

    let file = cx.scratch().join("more.xml");
    let shipped = host.domain()?;
    let disk = host
        .disk(&shipped)?
        .replace("exports/disk/", "exports/more/");
    fs::write(
        &file,
        disk.replace("vda", "vdc").replace("<boot order='1'/>", ""),
    )?;
    let file = file.display().to_string();
    host.virsh(&["attach-device", DOMAIN, &file])?;
    until("the guest has the disk", cx.patience(60), || {
        Ok(host.console().contains("[vdc]"))
    })?;
    host.virsh(&["detach-device", DOMAIN, &file])?;
    until("the disk is gone", cx.patience(60), || {
        Ok(!host.virsh(&["domblklist", DOMAIN])?.contains("vdc"))
    })?;
    host.wait_rounds(4)?;

    host.virsh(&["destroy", DOMAIN])?;
    stopped(third)?;
    stopped(server)
}

fn a_guest_moves_between_two_hosts(cx: &Context) -> Result<()> {
    let images = images(cx)?;
    let [here, there] = [
        Host::start(cx, "here", &images)?,
        Host::start(cx, "there", &images)?,
    ];
    let servers = [here.serve().start()?, there.serve().start()?];
    here.start_guest()?;
    here.virsh(&[
        "migrate",
        "--live",
        "--persistent",
        "--undefinesource",
        DOMAIN,
        &there.libvirt.uri(),
        "--migrateuri",
        "unix:///run/shared/moving",
    ])?;
    ensure!(there.state()? == "running");
    there.wait_rounds(8)?;
    there.virsh(&["destroy", DOMAIN])?;
    servers.into_iter().try_for_each(stopped)
}

/// Ends a server whose guests are gone.
fn stopped(server: Server) -> Result<()> {
    server.stop().map(drop)
}
