//! Block devices of ordinary users, with the udev rules that are shipped.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use ublkup::door::ublk;
use upgrade_proto::{Answer, Lookup, connect};

use super::common::{Driver, OK, eventually};
use super::common::{Sandbox, sandbox};
use super::intruders::{NOBODY, as_nobody};
use super::run;
use super::upgrade::{BLOCK, PLAIN, direct, leave, read_block, service, write_block};
use testkit::server::Server;

const RULES: &str = include_str!("../../package/udev/59-ublkup.rules");
const INSTALLED: &str = "/run/udev/rules.d/59-ublkup.rules";

/// udev, with the rules for members of the group `nogroup`; it ends with the value, and
/// `/dev/ublk-control` is root's again.
struct Udev(Child);

impl Udev {
    fn start(program: &Path) -> Self {
        let rules = RULES
            .replace("/usr/bin/ublkup", program.to_str().unwrap())
            .replace("GROUP=\"ublk\"", "GROUP=\"nogroup\"");
        assert!(rules.contains("nogroup"));
        fs::create_dir_all(Path::new(INSTALLED).parent().unwrap()).unwrap();
        fs::write(INSTALLED, rules).unwrap();
        let udevd = Command::new("/lib/systemd/systemd-udevd")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let udev = Self(udevd.expect("udev is installed"));
        eventually("udev answers", || {
            run("udevadm", &["control", "--ping", "--timeout=1"]).is_ok()
        });
        let control = "/sys/class/misc/ublk-control";
        run("udevadm", &["trigger", "--action=add", control]).unwrap();
        let group = || fs::metadata("/dev/ublk-control").unwrap().gid();
        eventually("the rules are obeyed", || group() == NOBODY);
        udev
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
        let _ = fs::remove_file(INSTALLED);
        chown("/dev/ublk-control", Some(0), Some(0)).unwrap();
        set_mode(Path::new("/dev/ublk-control"), 0o600);
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// An ordinary user with a disk image and a program.
struct User {
    lab: Sandbox,
    program: PathBuf,
    image: PathBuf,
}

impl User {
    fn new() -> Self {
        let lab = sandbox();
        set_mode(&lab.path("."), 0o755);
        // Where the program was built may be out of sight of others.
        let program = lab.path("ublkup");
        fs::copy(env!("CARGO_BIN_EXE_ublkup"), &program).unwrap();
        set_mode(&program, 0o755);
        let image = lab.image("disk.img", 16 << 20);
        fs::create_dir(lab.path("run")).unwrap();
        for path in [&image, &lab.path("run")] {
            chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        Self {
            lab,
            program,
            image,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let ids = [format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")];
        let mut command = Command::new("setpriv");
        command
            .args(ids)
            .arg("--clear-groups")
            .arg(&self.program)
            .args(args)
            .env("UBLKUP_RUNTIME_DIR", self.lab.path("run"))
            .stdin(Stdio::null());
        command
    }

    fn spec(&self) -> String {
        format!("d=file:{}", self.image.display())
    }

    fn serve(&self) -> Server {
        testkit::sandbox::start(self.command(&["serve", "--ublk", "yes", &self.spec()]))
    }

    fn output(&self, args: &[&str]) -> (bool, String) {
        let output = self.command(args).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    fn refused(&self, args: &[&str], why: &str) {
        let (well, text) = self.output(&[&["serve", "--ublk", "yes"], args].concat());
        assert!(!well && text.contains(why), "{args:?}: {text}");
    }
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_user_serves_a_disk_that_is_theirs_alone() {
    let user = User::new();
    user.refused(&[&user.spec()], "udev rules");
    let udev = Udev::start(&user.program);
    let server = user.serve();
    let (_, stat) = user.output(&["stat", "d", "--json"]);
    let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    let device: PathBuf = stat["ublk"]["device"].as_str().unwrap().into();
    let char_device = device.to_str().unwrap().replace("ublkb", "ublkc");
    assert_eq!(stat["ublk"]["data"], "copy");
    let features = stat["ublk"]["features"].to_string();
    assert!(features.contains("UNPRIVILEGED_DEV") && !features.contains("USER_RECOVERY"));
    let owner = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o777)
    };
    assert_eq!(owner(Path::new(&char_device)), (NOBODY, NOBODY, 0o600));
    // A mark is no secret: root does not take a user's device for its own by it.
    let note = fs::read_to_string(user.lab.path("run/exports/d/ublk-id")).unwrap();
    let mark: u64 = note.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert_eq!(ublk::marked(mark).unwrap(), None);
    assert!(as_nobody(|| ublk::marked(mark)).unwrap().is_some());
    eventually("the disk is theirs", || {
        owner(&device) == (NOBODY, NOBODY, 0o600)
    });
    // Its owner uses it, and comes to the vhost door by it, both ways.
    as_nobody(|| {
        let held = direct(&device);
        write_block(&held, 1, b'1').unwrap();
        for kernel in [true, false] {
            let lookup = Lookup {
                kernel,
                runtime_dirs: if kernel {
                    Vec::new()
                } else {
                    vec![user.lab.path("run")]
                },
                ..Lookup::default()
            };
            let Answer::Found(found) = connect(&held, &service(), &lookup).unwrap() else {
                panic!("no service, kernel {kernel}")
            };
            let mut driver = Driver::running(found.into_stream(), PLAIN);
            assert_eq!(
                driver.read(BLOCK as u64 / 512, BLOCK),
                (OK, vec![b'1'; BLOCK])
            );
            leave(driver);
        }
        assert!(read_block(&held, 1).0.iter().all(|&b| b == b'1'));
    });
    // Root's commands do not act on a user's word.
    for args in [
        &["list"][..],
        &["stat", "d"],
        &["stop", "d"],
        &["recover", "d"],
    ] {
        let words = ["run is not trusted", "belongs to user 65534"];
        user.lab.fails(args, 1, &words);
    }
    // A number belongs to who took it first, and root hears who that is.
    let id = device.to_str().unwrap().trim_start_matches("/dev/ublkb");
    let elsewhere = user.lab.path("root").display().to_string();
    let args = [
        "serve",
        "--runtime-dir",
        &elsewhere,
        "--ublk",
        "yes",
        "--ublk-id",
        id,
        "null:1M",
    ];
    user.lab
        .fails(&args, 1, &["in use by a device of user 65534"]);
    // Others do not, whatever the node's mode says.
    set_mode(&device, 0o666);
    let open = ["--reuid=1", "--regid=1", "--clear-groups", "head", "-c1"];
    let other = run(
        "setpriv",
        &[&open[..], &[device.to_str().unwrap()]].concat(),
    );
    assert!(other.unwrap_err().contains("not permitted"));
    let (well, doctor) = user.output(&["doctor"]);
    assert!(
        well && doctor.contains("devices of ordinary users"),
        "{doctor}"
    );
    let (well, text) = user.output(&["stop", "d"]);
    assert!(well, "{text}");
    assert_eq!(server.exit_code().unwrap(), Some(0));
    assert!(!Path::new(&char_device).exists());
    user.lab.is_clean();
    // What only root's devices have is refused, not left out.
    user.refused(&["--ublk-data", "zero-copy", &user.spec()], "--ublk-data");
    user.refused(
        &["--ublk-recovery", "reissue", &user.spec()],
        "--ublk-recovery",
    );
    // A server that dies takes its device with it; the next one removes what is left.
    user.serve().kill().unwrap();
    let server = user.serve();
    assert_eq!(fs::read_dir("/sys/class/ublk-char").unwrap().count(), 1);
    server.stop().unwrap();
    user.lab.is_clean();
    drop(udev);
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_user_without_rules_hears_of_them_and_root_tidies_up() {
    let user = User::new();
    let control = Path::new("/dev/ublk-control");
    set_mode(control, 0o666);
    user.refused(&[&user.spec()], "does not become ours: the udev rules");
    set_mode(control, 0o600);
    let devices = || fs::read_dir("/sys/class/ublk-char").unwrap().count();
    assert_eq!(devices(), 1, "who may not open it may not remove it");
    // Of the user's runtime directory root's command says that it is not trusted.
    let told = user.lab.finish(&["doctor", "--clean"], &[]).stdout;
    assert!(
        told.contains("run is not trusted: it belongs to user 65534"),
        "{told}"
    );
    assert_eq!(devices(), 0);
    user.lab.is_clean();
}

/// Of an export that they may not look into, users are not told that its server has died.
#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn a_living_server_of_another_user_is_not_said_to_be_dead() {
    let lab = sandbox();
    set_mode(&lab.path(""), 0o755);
    let server = lab.serve(&["--ublk", "no", "d=null:1M"]);
    let program = lab.path("ublkup");
    fs::copy(env!("CARGO_BIN_EXE_ublkup"), &program).unwrap();
    for word in ["list", "doctor"] {
        let mut command = Command::new(&program);
        command
            .arg(word)
            .env("UBLKUP_RUNTIME_DIR", lab.path("run"))
            .uid(NOBODY)
            .gid(NOBODY);
        let output = command.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("ermission denied"), "{said}");
        assert!(!said.contains("has died"), "{said}");
    }
    server.stop().unwrap();
    lab.is_clean();
}
