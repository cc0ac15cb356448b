//! Servers that die: what their clients notice of it, which is a pause.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use super::io::Exercise;
use crate::kernel::Kernel;
use crate::kit::server::{Serve, Server};
use crate::machine::{Machine, Qemu};
use crate::test;
use crate::test::{Context, Test};

/// On the host.
pub const TESTS: &[Test] =
    &[test!(a_guest_verifies_its_disk_while_servers_are_killed_under_it).limit_s(900)];

const DISK_BYTES: u64 = 96 << 20;

/// How long a server lives.
const LIFETIME: Duration = Duration::from_millis(700);

fn serve(cx: &Context, image: &Path, socket: &Path) -> Result<Server> {
    Serve::new(cx)
        .env("UBLKUP_RUNTIME_DIR", cx.scratch().join("run"))
        .ublk("no")
        .name("disk")
        .vhost_socket(socket)
        .arg(format!("file:{}", image.display()))
        .start()
}

fn a_guest_verifies_its_disk_while_servers_are_killed_under_it(cx: &Context) -> Result<()> {
    let image = cx.scratch().join("disk.img");
    std::fs::File::create(&image)?.set_len(DISK_BYTES)?;
    let socket = cx.scratch().join("disk.sock");
    let mut server = serve(cx, &image, &socket)?;
    let kernel = cx.paths.kernel(Kernel::X86)?;
    let qemu = Qemu::new(kernel)
        .processors(2)
        .memory_mib(512)
        .argument("-chardev")
        .argument(format!(
            "socket,id=disk,path={},reconnect-ms=100",
            socket.display()
        ))
        .argument("-device")
        .argument("vhost-user-blk-pci,chardev=disk");
    let mut guest = Machine::boot(&qemu, &cx.paths, "survive")?;
    let mut plan = Exercise::new(Path::new("/dev/vda"), DISK_BYTES);
    plan.run_mib = 32;
    let kills = thread::scope(|scope| {
        let running = scope.spawn(|| guest.run_step::<_, ()>(&cx.paths, "exercise_disk", &plan));
        let mut kills = 0;
        let mut next = Instant::now() + LIFETIME;
        while !running.is_finished() {
            thread::sleep(Duration::from_millis(50));
            if Instant::now() > next {
                server.kill()?;
                server = serve(cx, &image, &socket)?;
                kills += 1;
                next = Instant::now() + LIFETIME;
            }
        }
        running.join().map_err(|_| anyhow!("the step panicked"))??;
        anyhow::Ok((kills, server))
    });
    let (kills, server) = kills?;
    println!("the guest noticed none of {kills} deaths");
    ensure!(kills >= 10, "only {kills} servers were killed");
    guest.power_off();
    server.stop()?;
    Ok(())
}
