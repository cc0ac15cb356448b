//! The server's own mount namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use testkit::images::{make_ext4, mount, mount_ext4};
use testkit::wait::eventually;

use crate::MIB;
use crate::common::sandbox;
use crate::data::serve;

fn mounts(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap()
}

/// The mount namespaces of a process's threads.
fn namespaces(pid: &str) -> BTreeSet<PathBuf> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let namespaces = threads.map(|thread| fs::read_link(thread.unwrap().path().join("ns/mnt")));
    namespaces.map(Result::unwrap).collect()
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_server_has_the_mounts_that_it_needs_and_no_others() {
    let lab = sandbox();
    let (images, other) = (lab.path("images"), lab.path("other"));
    let image_mount = mount(Path::new("images"), "tmpfs", &images, false).unwrap();
    let other_mount = mount(Path::new("other"), "tmpfs", &other, false).unwrap();
    let image = images.join("disk.img");
    make_ext4(&image, 64 * MIB, None).unwrap();
    for sandbox in ["--sandbox=yes", "--sandbox=no"] {
        let spec = format!("file:{}", image.display());
        let (server, disk) = serve(&lab, "own", &spec, &["--queues", "2", sandbox]);
        let pid = server.pid().to_string();
        let own = namespaces(&pid);
        assert_eq!(own.len(), 1, "{own:?}");
        assert_ne!(own, namespaces("self"));
        let disk_mount = mount_ext4(&disk, &lab.path("mnt"), false).unwrap();
        let outside = mounts("self");
        let inside = mounts(&pid);
        for place in [&images, &other, disk_mount.dir()] {
            let place = format!(" {} ", place.display());
            assert!(outside.contains(&place), "{outside}");
            assert!(!inside.contains(&place), "{inside}");
        }
        // Those that have the disk mounted are found all the same.
        lab.fails(&["stop", "own"], 1, &["in use", "mounted at"]);
        // The image is in use, and its file system with it.
        let busy = unmount(&images, UnmountFlags::empty());
        assert_eq!(busy, Err(Errno::BUSY));
        disk_mount.unmount().unwrap();
        server.stop().unwrap();
        lab.is_clean();
    }
    other_mount.unmount().unwrap();
    image_mount.unmount().unwrap();
}

/// As in a container: all but the server have gone, and it is killed.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn the_last_process_of_a_namespace_with_its_disk_mounted_can_be_killed() {
    const SERVE: &str = r#"
        start() {
            rm -f "$dir/out"
            "$0" "$@" >"$dir/out" 2>"$dir/err" &
            server=$!
            until grep -qs ready "$dir/out"; do kill -0 $server || exit 1; sleep 0.1; done
        }
        mount --make-rprivate / || exit 1
        start serve "d=file:$dir/disk.img"
        mount "$(sed -n 's/^d ublk //p' "$dir/out")" "$dir/mnt" || exit 1"#;
    const KILL: &str = "kill -9 $server; wait $server";
    const DIRTY: &str = r#"
        dd if=/dev/zero of="$dir/mnt/dirty" bs=1M count=10 status=none
        echo $server >"$dir/pid""#;
    let recovered = [SERVE, KILL, "start recover d", DIRTY].join("\n");
    let unconfined = [SERVE, KILL, "start recover d --sandbox=no", DIRTY].join("\n");
    for script in [[SERVE, DIRTY].join("\n"), recovered, unconfined] {
        let lab = sandbox();
        make_ext4(&lab.path("disk.img"), 64 * MIB, None).unwrap();
        fs::create_dir(lab.path("mnt")).unwrap();
        let mut shell = Command::new("unshare");
        shell
            .args(["-m", "sh", "-c", &script, env!("CARGO_BIN_EXE_ublkup")])
            .env("dir", lab.path(""))
            .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
            .stdin(Stdio::null())
            .process_group(0);
        let status = shell.status().unwrap();
        let log = fs::read_to_string(lab.path("err")).unwrap_or_default();
        assert!(status.success(), "{log}");
        let pid = fs::read_to_string(lab.path("pid")).unwrap();
        let process = Path::new("/proc").join(pid.trim());
        crate::run("kill", &["-9", pid.trim()]).unwrap();
        eventually("the server is gone", || {
            let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        });
        lab.ok(&["stop", "--force", "d"]);
        lab.is_clean();
    }
}
