//! Ways to a disk that is not one's own: each is tried, and refused with its errno. Afterwards the disk is as usable
//! as before, by the rightful client and at the block device.

use std::fs::{self, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{major, minor};
use rustix::io::Errno;
use upgrade_proto::{Answer, Key, Listener, NoService, Options, Route};

use super::common::sandbox;
use super::common::{Driver, OK};
use super::run;
use super::upgrade::{
    BLOCK, Export, PLAIN, direct, errno, leave, read_block, serve, serve_in, service, stat,
    write_block,
};

/// A user without rights.
pub const NOBODY: u32 = 65534;

const ROUTES: [Route; 2] = [Route::Kernel, Route::Registry];

/// Does `work` with the rights of nobody, in a thread of its own: the raw system calls change one
/// thread only.
pub fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let give_up_rights = || {
        let none = std::ptr::null::<libc::gid_t>();
        // SAFETY: no memory is involved, the list of groups is empty; the credentials are this
        // thread's, which ends with `work`.
        let changed = unsafe {
            [
                libc::syscall(libc::SYS_setgroups, 0, none),
                libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY),
                libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
            ]
        };
        assert_eq!(changed, [0; 3]);
        work()
    };
    std::thread::scope(|scope| scope.spawn(give_up_rights).join()).expect("the thread ends well")
}

/// The service's address behind a descriptor of this process.
fn address(fd: &File, name: &str) -> String {
    format!("/dev/self/fd/{}/{name}", fd.as_raw_fd())
}

/// What connecting to a socket address ends with.
fn refusal(address: impl AsRef<Path>) -> Option<i32> {
    errno(UnixStream::connect(address).map(drop))
}

/// What the kernel says to a client with this descriptor of a disk.
fn kernel_says(fd: &File) -> Option<i32> {
    refusal(address(fd, "vhost-user-blk"))
}

fn opened(disk: &Path, read: bool, write: bool) -> std::io::Result<File> {
    File::options().read(read).write(write).open(disk)
}

impl Export {
    /// Why a descriptor leads nowhere.
    fn refused(&self, fd: &File, route: Route) -> NoService {
        match self.answer(fd, route) {
            Answer::NoService(why) => why,
            Answer::Found(_) => panic!("it leads to the server by {route:?}"),
        }
    }

    /// The rightful client gets the disk by both ways, and after it the block device writes.
    fn is_intact(&self) {
        for route in ROUTES {
            let mut driver = Driver::running(self.come(route), PLAIN);
            assert_eq!(self.access(), "upgraded");
            assert_eq!(driver.write(0, &[b'v'; BLOCK]), OK);
            leave(driver);
            self.expect_access("block");
            let block = direct(&self.disk);
            assert!(read_block(&block, 0).0.iter().all(|&b| b == b'v'));
            write_block(&block, 0, b'b').unwrap();
            assert!(read_block(&block, 0).0.iter().all(|&b| b == b'b'));
        }
    }

    fn registry(&self) -> PathBuf {
        self.lab.path("run/fd-upgrade")
    }

    /// The disk's folder in the registry.
    fn folder(&self) -> PathBuf {
        let entries = fs::read_dir(self.registry()).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut folders = paths.filter(|path| path.is_dir());
        let folder = folders.next().expect("a folder");
        assert!(folders.next().is_none(), "there is one disk");
        folder
    }

    /// The disk's socket in the registry.
    fn entry(&self) -> PathBuf {
        self.folder().join("vhost-user-blk")
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_unprivileged_user_gets_to_a_disk_by_no_way() {
    let export = serve(&[]);
    let disk = export.disk.as_path();
    let char_device = PathBuf::from(disk.to_str().unwrap().replace("ublkb", "ublkc"));
    for (read, write) in [(true, false), (false, true), (true, true)] {
        for device in [disk, &char_device] {
            let denied = as_nobody(|| errno(opened(device, read, write).map(drop)));
            assert_eq!(denied, Some(libc::EACCES), "{}", device.display());
        }
    }
    // The device through which the server binds is not even root's to open.
    let busy = errno(opened(&char_device, true, true).map(drop));
    assert_eq!(busy, Some(libc::EBUSY));

    // Handed a descriptor for reading.
    let reader = opened(disk, true, false).unwrap();
    let read = as_nobody(|| {
        let reasons = ROUTES.map(|route| export.refused(&reader, route));
        (kernel_says(&reader), reasons)
    });
    let [kernel, registry] = read.1;
    assert_eq!(read.0, Some(libc::EACCES));
    assert_eq!(kernel, NoService::Refused(Errno::ACCESS));
    assert_eq!(registry, NoService::ReadOnlyDescriptor);

    // Being found at a disk is not for everybody, whatever descriptor one has, and be it the first.
    let both = opened(disk, true, true).unwrap();
    for name in ["vhost-user-blk", "another"] {
        for fd in [&reader, &both] {
            let bound = as_nobody(|| errno(UnixListener::bind(address(fd, name)).map(drop)));
            assert_eq!(bound, Some(libc::EPERM), "{name}");
        }
    }
    let options = Options {
        runtime_dir: None,
        ..Options::default()
    };
    let bound = as_nobody(|| Listener::bind(&both, &service(), &options).map(drop));
    assert_eq!(bound.unwrap_err().errno(), Errno::PERM);
    // For root the place is taken.
    let taken = errno(UnixListener::bind(address(&both, "vhost-user-blk")).map(drop));
    assert_eq!(taken, Some(libc::EADDRINUSE));
    drop((reader, both));
    export.is_intact();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_unprivileged_user_connects_to_no_socket_of_a_server() {
    let export = serve(&[]);
    let folder = export.lab.path("run/exports/d");
    let mut sockets: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_socket())
        .map(|entry| entry.path())
        .collect();
    sockets.push(export.entry());
    // Control, vhost door, registry.
    assert_eq!(sockets.len(), 3, "{sockets:?}");
    // As it stands, and with every directory open: the sockets themselves refuse.
    for open in [false, true] {
        for socket in &sockets {
            if open {
                let temp = export.lab.path("");
                for dir in socket.ancestors().skip(1) {
                    set_mode(dir, 0o755);
                    if dir == temp.as_path() {
                        break;
                    }
                }
            }
            let denied = as_nobody(|| refusal(socket));
            assert_eq!(denied, Some(libc::EACCES), "{}", socket.display());
        }
    }
    // Not with a descriptor either: the registry cannot see it. The kernel does, and lets its
    // holder in: whoever gave the descriptor away gave the disk.
    let both = opened(&export.disk, true, true).unwrap();
    let why = as_nobody(|| export.refused(&both, Route::Registry));
    assert_eq!(why, NoService::Refused(Errno::ACCESS));
    let holder = as_nobody(|| matches!(export.answer(&both, Route::Kernel), Answer::Found(_)));
    assert!(holder, "who holds the disk is refused");
    drop(both);
    export.is_intact();
    export.end();
}

/// The same with the program as it is, and a process that was nobody's from its start.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn an_unprivileged_process_is_told_that_it_may_not() {
    let export = serve(&[]);
    set_mode(&export.lab.path(""), 0o755);
    let program = export.lab.path("ublkup");
    fs::copy(env!("CARGO_BIN_EXE_ublkup"), &program).unwrap();
    let reader = || opened(&export.disk, true, false).unwrap();
    for device in [export.disk.as_path(), Path::new("/proc/self/fd/0")] {
        for command in ["probe", "qemu"] {
            let mut probe = Command::new(&program);
            probe.arg(command).arg(device);
            if command == "qemu" {
                probe.args(["--", "true"]);
            }
            probe
                .env("UBLKUP_RUNTIME_DIR", export.lab.path("run"))
                .stdin(match device {
                    _ if device == export.disk => Stdio::null(),
                    _ => Stdio::from(reader()),
                })
                .uid(NOBODY)
                .gid(NOBODY);
            let output = probe.output().unwrap();
            let said = [output.stdout, output.stderr].concat();
            let said = String::from_utf8_lossy(&said);
            let code = if command == "probe" { 3 } else { 1 };
            assert_eq!(output.status.code(), Some(code), "{said}");
            assert!(said.contains("Permission denied"), "{said}");
        }
    }
    export.is_intact();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn half_a_descriptor_of_a_writable_disk_leads_nowhere() {
    let export = serve(&[]);
    let halves = [
        (true, NoService::ReadOnlyDescriptor),
        (false, NoService::WriteOnlyDescriptor),
    ];
    for (read, why) in halves {
        let half = opened(&export.disk, read, !read).unwrap();
        assert_eq!(kernel_says(&half), Some(libc::EACCES));
        let by_kernel = export.refused(&half, Route::Kernel);
        assert_eq!(by_kernel, NoService::Refused(Errno::ACCESS));
        assert_eq!(export.refused(&half, Route::Registry), why);
    }
    // A descriptor that only names the disk is none.
    let mut only_named = File::options();
    only_named.read(true).custom_flags(libc::O_PATH);
    let named = only_named.open(&export.disk).unwrap();
    assert_eq!(kernel_says(&named), Some(libc::EBADF));
    for route in ROUTES {
        let error = upgrade_proto::connect(&named, &service(), &export.lookup(route)).unwrap_err();
        assert_eq!(error.errno(), Errno::BADF, "{route:?}");
    }
    drop(named);
    export.is_intact();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_of_somebody_else_offers_nothing() {
    let export = serve(&[]);
    let image = export.lab.image("other.img", 1 << 20);
    let other = run("losetup", &["-f", "--show", image.to_str().unwrap()]).unwrap();
    let held = opened(Path::new(&other), true, true).unwrap();
    let says = kernel_says(&held);
    let reasons = ROUTES.map(|route| export.refused(&held, route));
    drop(held);
    run("losetup", &["-d", &other]).unwrap();
    assert_eq!(says, Some(libc::ECONNREFUSED));
    assert_eq!(reasons, [NoService::NotOffered, NoService::NotOffered]);
    // And our disk offers nothing but what it is asked for.
    let held = direct(&export.disk);
    let ring = refusal(address(&held, "ring-buffer"));
    assert_eq!(ring, Some(libc::ECONNREFUSED));
    drop(held);
    export.is_intact();
    export.end();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn what_a_killed_server_left_in_the_registry_leads_nowhere() {
    let lab = sandbox();
    let spec = format!("file:{}", lab.image("disk.img", 64 << 20).display());
    let export = serve_in(lab, &spec, &[]);
    let held = direct(&export.disk);
    let entry = export.entry();
    let Export { lab, server, .. } = export;
    server.kill().unwrap();
    // The device waits for a server, the socket file is left.
    let left = fs::symlink_metadata(&entry).unwrap();
    assert!(left.file_type().is_socket());
    assert_eq!(kernel_says(&held), Some(libc::ECONNREFUSED));
    assert_eq!(refusal(&entry), Some(libc::ECONNREFUSED));
    let lookup = |route| upgrade_proto::Lookup {
        kernel: route == Route::Kernel,
        runtime_dirs: vec![lab.path("run")],
        ..upgrade_proto::Lookup::default()
    };
    for route in ROUTES {
        let answer = upgrade_proto::connect(&held, &service(), &lookup(route)).unwrap();
        assert!(
            matches!(answer, Answer::NoService(NoService::NotOffered)),
            "{route:?}: {answer:?}"
        );
    }
    // The next server takes its place, and clears away what is left of other disks.
    let other = lab.path("run/fd-upgrade/blk-1-2-3");
    fs::create_dir(&other).unwrap();
    let stale = other.join("vhost-user-blk");
    drop(UnixListener::bind(&stale).unwrap());
    set_mode(&stale, 0o600);
    let export = serve_in(lab, &spec, &[]);
    assert!(!other.exists());
    assert_eq!(export.entry(), entry);
    drop(held);
    export.is_intact();
    export.end();
}

/// A server of nobody's that waits at `path`, in a directory of nobody's meanwhile.
fn plant(path: &Path) -> UnixListener {
    let dir = path.parent().unwrap();
    let owner = fs::metadata(dir).unwrap().uid();
    chown(dir, Some(NOBODY), None).unwrap();
    let listener = as_nobody(|| {
        let listener = UnixListener::bind(path).unwrap();
        set_mode(path, 0o600);
        listener
    });
    chown(dir, Some(owner), None).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

/// Plants something in the registry, and what is said about it.
type Planting = (fn(&Export) -> Option<UnixListener>, &'static str);

const PLANTINGS: [Planting; 4] = [
    (
        |export| {
            fs::remove_file(export.entry()).unwrap();
            Some(plant(&export.entry()))
        },
        "belongs to user 65534",
    ),
    (
        |export| {
            let elsewhere = export.lab.path("planted");
            let listener = plant(&elsewhere);
            fs::remove_file(export.entry()).unwrap();
            symlink(&elsewhere, export.entry()).unwrap();
            Some(listener)
        },
        "is a symbolic link",
    ),
    (
        |export| {
            set_mode(&export.registry(), 0o777);
            None
        },
        "others may write",
    ),
    (
        |export| {
            set_mode(&export.folder(), 0o777);
            None
        },
        "others may write",
    ),
];

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn what_others_planted_in_the_registry_is_refused_by_clients_and_servers() {
    for (planting, says) in PLANTINGS {
        let lab = sandbox();
        set_mode(&lab.path(""), 0o755);
        let spec = format!("file:{}", lab.image("disk.img", 64 << 20).display());
        let export = serve_in(lab, &spec, &[]);
        let planted = planting(&export);
        let held = direct(&export.disk);
        let why = export.refused(&held, Route::Registry);
        assert_eq!(why.errno(), Errno::PERM);
        assert!(why.to_string().contains(says), "{why}");
        if let Some(planted) = &planted {
            let seen = planted.accept().unwrap_err();
            assert_eq!(seen.kind(), ErrorKind::WouldBlock, "{says}");
        }
        drop(held);
        // The kernel's way does not lead through the registry.
        leave(Driver::running(export.come(Route::Kernel), PLAIN));
        export.expect_access("block");

        // A server does not publish there, says why, and goes on by the kernel's way.
        let Export { lab, server, disk } = export;
        server.kill().unwrap();
        let server = lab.serve(&["--ublk", "yes", "--name", "d", &spec]);
        let ways = &stat(&lab)["vhost"]["upgrade"];
        assert_eq!(*ways, serde_json::json!(["kernel"]), "{says}");
        let export = Export { lab, server, disk };
        leave(Driver::running(export.come(Route::Kernel), PLAIN));
        export.expect_access("block");
        let log = export.server.stop().unwrap();
        assert!(log.contains("no entry in the registry"), "{log}");
        export.lab.is_clean();
    }
}

fn number_of(disk: &Path) -> (u32, u32) {
    let number = fs::metadata(disk).unwrap().rdev();
    (major(number), minor(number))
}

/// A registry that still has the first disk, with somebody waiting there.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_disk_with_the_number_of_an_earlier_one_is_not_taken_for_it() {
    let first = serve(&["--ublk-id", "41"]);
    let number = number_of(&first.disk);
    let key = Key::of_disk(number.0, number.1).unwrap();
    let entry = first.entry();
    let held = direct(&first.disk);
    let Export {
        lab: old, server, ..
    } = first;
    server.kill().unwrap();
    fs::remove_file(&entry).unwrap();
    let waiting = UnixListener::bind(&entry).unwrap();
    set_mode(&entry, 0o600);
    waiting.set_nonblocking(true).unwrap();
    old.ok(&["doctor", "--clean"]);

    // While somebody has the old disk, a new one is another, and he does not get there.
    let between = serve(&[]);
    let says = kernel_says(&held);
    assert!(
        matches!(says, Some(libc::ECONNREFUSED | libc::ENODEV)),
        "{says:?}"
    );
    between.is_intact();
    between.end();
    drop(held);

    // The kernel gives the lowest number that is free: others may have become free meanwhile, and this one
    // may become so later.
    let mut lower = Vec::new();
    let second = (0..50).find_map(|_| {
        let second = serve(&["--ublk-id", "41"]);
        let got = number_of(&second.disk);
        if got == number {
            return Some(second);
        }
        second.end();
        if got < number {
            lower.push(serve(&[]));
        } else {
            thread::sleep(Duration::from_millis(100));
        }
        None
    });
    let second = second.expect("the number is recycled");
    assert_ne!(Key::of_disk(number.0, number.1).unwrap(), key);
    let lookup = upgrade_proto::Lookup {
        kernel: false,
        runtime_dirs: vec![old.path("run")],
        ..upgrade_proto::Lookup::default()
    };
    let held = direct(&second.disk);
    let answer = upgrade_proto::connect(&held, &service(), &lookup).unwrap();
    assert!(
        matches!(answer, Answer::NoService(NoService::NotOffered)),
        "{answer:?}"
    );
    let seen = waiting.accept().unwrap_err();
    assert_eq!(seen.kind(), ErrorKind::WouldBlock);
    drop(held);
    second.is_intact();
    second.end();
    lower.into_iter().for_each(Export::end);
}
