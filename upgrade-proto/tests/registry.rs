//! The registry's route, with its rules of trust; each test has a runtime directory of its own.

use std::fs;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Barrier;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::TempDir;
use upgrade_proto::{
    Answer, Connection, Error, Listener, Lookup, Name, NoService, Options, Route, connect,
    remove_stale_entries, stale_entries,
};

const STRANGER: u32 = 12345;

struct Place {
    dir: TempDir,
    read: PipeReader,
    write: PipeWriter,
    name: Name,
}

impl Place {
    fn new() -> Self {
        let (read, write) = std::io::pipe().expect("a pipe");
        let name = Name::new("service").expect("a name");
        Self {
            dir: tempfile::tempdir().expect("a directory"),
            read,
            write,
            name,
        }
    }

    fn options(&self) -> Options {
        Options {
            kernel: false,
            runtime_dir: Some(self.dir.path().to_owned()),
            ..Options::default()
        }
    }

    fn lookup(&self) -> Lookup {
        Lookup {
            kernel: false,
            runtime_dirs: vec![self.dir.path().to_owned()],
            ..Lookup::default()
        }
    }

    fn bind(&self, fd: impl AsFd) -> Result<Listener, Error> {
        Listener::bind(fd, &self.name, &self.options())
    }

    /// The listener at the writing end.
    fn serve(&self) -> Listener {
        self.bind(&self.write).expect("bound")
    }

    /// Another server is refused, because there is one.
    fn has_rival(&self, fd: impl AsFd) {
        let error = self.bind(fd).expect_err("a rival");
        assert_eq!(error.errno(), Errno::ADDRINUSE);
    }

    fn ask(&self, fd: impl AsFd) -> Answer<Connection> {
        connect(fd, &self.name, &self.lookup()).expect("an answer")
    }

    fn connect(&self, fd: impl AsFd) -> Connection {
        self.ask(fd).found().expect("connected")
    }

    fn refusal(&self) -> NoService {
        self.refusal_of(&self.read)
    }

    fn refusal_of(&self, fd: impl AsFd) -> NoService {
        match self.ask(fd) {
            Answer::Found(connection) => panic!("connected: {connection:?}"),
            Answer::NoService(why) => why,
        }
    }

    fn registry(&self) -> PathBuf {
        self.dir.path().join("fd-upgrade")
    }

    /// The one object's folder.
    fn folder(&self) -> PathBuf {
        self.folders().pop().expect("a folder")
    }

    /// What is in the registry beside its lock.
    fn folders(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.registry()).expect("the registry");
        let paths = entries.map(|entry| entry.expect("read").path());
        paths.filter(|path| path.is_dir()).collect()
    }

    fn entry(&self) -> PathBuf {
        self.folder().join("service")
    }

    /// Where a part of an entry is.
    fn part(&self, part: &str) -> PathBuf {
        match part {
            "socket" => self.entry(),
            "folder" => self.folder(),
            "registry" => self.registry(),
            _ => self.dir.path().to_owned(),
        }
    }

    /// An entry whose server died.
    fn leave_stale_entry(&self) -> PathBuf {
        let listener = self.serve();
        let entry = self.entry();
        drop(listener);
        fs::create_dir(entry.parent().expect("a folder")).expect("made");
        drop(UnixListener::bind(&entry).expect("bound"));
        fs::set_permissions(&entry, fs::Permissions::from_mode(0o600)).expect("changed");
        entry
    }
}

/// Runs `work` as another user, in a thread of its own: the raw system call changes one thread only.
fn as_stranger<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let run = || {
        // SAFETY: no memory is involved; the credentials are this thread's, which ends with `work`.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, STRANGER, STRANGER, STRANGER) };
        assert_eq!(changed, 0);
        work()
    };
    std::thread::scope(|scope| scope.spawn(run).join()).expect("the thread ends well")
}

#[test]
fn the_other_end_of_a_pipe_finds_the_service_and_talks_to_it() {
    let place = Place::new();
    let listener = place.serve();
    assert_eq!(listener.routes(), [Route::Registry]);
    assert!(listener.accept().expect("asked").is_none());
    let client = place.connect(&place.read);
    let server = listener.accept().expect("accepted").expect("a client");
    assert_eq!(
        (client.route(), server.route()),
        (Route::Registry, Route::Registry)
    );
    assert_eq!(client.peer().uid, rustix::process::geteuid().as_raw());
    client.stream().write_all(b"hello").expect("sent");
    let mut heard = [0; 5];
    server.stream().read_exact(&mut heard).expect("heard");
    assert_eq!(&heard, b"hello");
}

#[test]
fn the_listener_is_readable_only_while_a_client_waits() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let place = Place::new();
    let listener = place.serve();
    let ready = || {
        poll(
            &mut [PollFd::new(&listener, PollFlags::IN)],
            Some(&Timespec::default()),
        )
        .expect("polled")
    };
    assert_eq!(ready(), 0);
    let _client = place.connect(&place.read);
    assert_eq!(ready(), 1);
    let _server = listener.accept().expect("accepted").expect("a client");
    assert_eq!(ready(), 0);
}

#[test]
fn the_same_end_of_a_pipe_and_another_pipe_find_nothing() {
    let place = Place::new();
    let _listener = place.serve();
    let (other, _write) = std::io::pipe().expect("a pipe");
    let file = tempfile::tempfile().expect("file");
    for fd in [place.write.as_fd(), other.as_fd(), file.as_fd()] {
        assert_eq!(place.refusal_of(fd), NoService::NotOffered);
    }
    place.connect(&place.read);
}

#[test]
fn an_end_opened_for_both_meets_both_and_rivals_both() {
    let place = Place::new();
    let path = format!("/proc/self/fd/{}", place.read.as_raw_fd());
    let both = fs::File::options().read(true).write(true).open(path);
    let both = both.expect("reopened");
    let listener = place.bind(&both).expect("bound");
    place.connect(&place.read);
    place.connect(&place.write);
    place.has_rival(&place.read);
    drop(listener);
    let _reader = place.bind(&place.read).expect("bound");
    let _writer = place.serve();
    place.has_rival(&both);
}

#[test]
fn dropping_the_listener_removes_its_entry_and_keeps_connections() {
    let place = Place::new();
    let listener = place.serve();
    let client = place.connect(&place.read);
    let server = listener.accept().expect("accepted").expect("a client");
    drop(listener);
    assert!(place.folders().is_empty());
    assert_eq!(place.refusal(), NoService::NotOffered);
    server.stream().write_all(b"!").expect("sent");
    let mut heard = [0];
    client.stream().read_exact(&mut heard).expect("heard");
}

#[test]
fn dropping_the_listener_leaves_a_successors_entry_alone() {
    let place = Place::new();
    let listener = place.serve();
    fs::remove_file(place.entry()).expect("removed");
    let _successor = place.serve();
    drop(listener);
    place.connect(&place.read);
}

#[test]
fn a_listener_does_not_keep_the_pipe_open() {
    let mut place = Place::new();
    let _listener = place.serve();
    drop(place.write);
    assert_eq!(place.read.read(&mut [0]).expect("end of file"), 0);
}

#[test]
fn a_stale_entry_is_ignored_by_clients_and_replaced_by_the_next_server() {
    let place = Place::new();
    let entry = place.leave_stale_entry();
    assert_eq!(place.refusal(), NoService::NotOffered);
    assert!(entry.exists());
    let _listener = place.serve();
    place.connect(&place.read);
}

#[test]
fn of_servers_that_bind_at_once_one_wins_and_the_others_learn_it() {
    for stale in [false, true].repeat(40) {
        let place = Place::new();
        if stale {
            place.leave_stale_entry();
        }
        let (start, end) = (Barrier::new(8), Barrier::new(8));
        let race = || {
            start.wait();
            let result = place.bind(&place.write);
            end.wait();
            result.map(drop).map_err(Errno::from)
        };
        let results: Vec<_> = std::thread::scope(|scope| {
            let racers = [(); 8].map(|()| scope.spawn(race));
            racers.map(|racer| racer.join().expect("ended")).into()
        });
        let count = |wanted| results.iter().filter(|result| **result == wanted).count();
        let counts = (count(Ok(())), count(Err(Errno::ADDRINUSE)));
        assert_eq!(counts, (1, 7), "{results:?}");
    }
}

#[test]
fn the_probe_for_a_rival_is_not_seen_as_a_client() {
    let place = Place::new();
    let listener = place.serve();
    place.has_rival(&place.write);
    assert!(listener.accept().expect("asked").is_none());
}

#[test]
fn a_symlink_in_place_of_socket_folder_or_registry_is_refused() {
    for part in ["socket", "folder", "registry"] {
        let place = Place::new();
        let _listener = place.serve();
        let path = place.part(part);
        place.connect(&place.read);
        let moved = place.dir.path().join("moved");
        fs::rename(&path, &moved).expect("moved");
        symlink(&moved, &path).expect("linked");
        let NoService::Untrusted(why) = place.refusal() else {
            panic!("{part}: {:?}", place.refusal())
        };
        assert!(why.contains("symbolic link"), "{part}: {why}");
        assert_eq!(place.refusal().errno(), Errno::PERM);
    }
}

#[test]
fn what_others_may_write_to_is_refused_by_clients_and_servers() {
    for (part, mode) in [
        ("socket", 0o602),
        ("folder", 0o777),
        ("registry", 0o730),
        ("runtime", 0o777),
    ] {
        let place = Place::new();
        let _listener = place.serve();
        fs::set_permissions(place.part(part), fs::Permissions::from_mode(mode)).expect("changed");
        assert!(matches!(place.refusal(), NoService::Untrusted(_)), "{part}");
        let error = place.bind(&place.write).expect_err("refused");
        assert!(matches!(error, Error::Untrusted { .. }), "{part}: {error}");
    }
}

#[test]
#[ignore = "needs root, to give files to another user"]
fn what_belongs_to_another_user_is_refused() {
    for part in ["socket", "folder", "registry"] {
        let place = Place::new();
        let _listener = place.serve();
        chown(place.part(part), Some(STRANGER), None).expect("given away");
        let NoService::Untrusted(why) = place.refusal() else {
            panic!("{part}: {:?}", place.refusal())
        };
        assert!(why.contains("belongs to user 12345"), "{part}: {why}");
    }
}

#[test]
#[ignore = "needs root, to give files to another user"]
fn a_server_of_another_user_behind_a_trusted_entry_is_refused() {
    let place = Place::new();
    chown(place.dir.path(), Some(STRANGER), None).expect("given away");
    let _listener = as_stranger(|| place.bind(&place.write)).expect("bound");
    for part in ["socket", "folder", "registry", "runtime"] {
        chown(place.part(part), Some(0), None).expect("taken");
    }
    assert_eq!(place.refusal(), NoService::ForeignPeer { uid: STRANGER });
}

#[test]
#[ignore = "needs root, to give files to another user"]
fn an_unprivileged_client_cannot_use_roots_entry() {
    let place = Place::new();
    let listener = place.serve();
    fs::set_permissions(place.dir.path(), fs::Permissions::from_mode(0o755)).expect("opened");
    assert_eq!(
        as_stranger(|| place.refusal()),
        NoService::Refused(Errno::ACCESS)
    );
    assert!(listener.accept().expect("asked").is_none());
}

#[test]
#[ignore = "needs root, to give files to another user"]
fn a_path_below_a_directory_of_another_user_is_given_to_no_program() {
    let mut place = Place::new();
    let above = place.dir;
    place.dir = TempDir::new_in(above.path()).expect("a directory");
    let _listener = place.serve();
    let connection = place.connect(&place.read);
    let path = connection.lasting_path().expect("trusted").expect("a path");
    assert_eq!(path.canonicalize().expect("there"), path);
    chown(above.path(), Some(STRANGER), None).expect("given away");
    // The connection is as good as before: what was checked is what is used.
    let error = place
        .connect(&place.read)
        .lasting_path()
        .expect_err("refused");
    assert!(
        error.to_string().contains("belongs to user 12345"),
        "{error}"
    );
    chown(above.path(), Some(0), None).expect("taken");
}

#[test]
fn an_entry_is_for_its_owner_alone() {
    let place = Place::new();
    let _listener = place.serve();
    let mode = |path| fs::metadata(path).expect("examined").permissions().mode() & 0o777;
    assert_eq!(mode(place.entry()), 0o600);
    assert_eq!(mode(place.folder()) & 0o066, 0);
    assert_eq!(mode(place.registry()) & 0o066, 0);
}

#[test]
fn a_full_backlog_is_an_error_in_time_and_not_a_missing_service() {
    let place = Place::new();
    let options = Options {
        backlog: 0,
        ..place.options()
    };
    let _listener = Listener::bind(&place.write, &place.name, &options).expect("bound");
    let _waiting = place.connect(&place.read);
    let lookup = Lookup {
        timeout: std::time::Duration::from_millis(50),
        ..place.lookup()
    };
    let asked = std::time::Instant::now();
    let error = connect(&place.read, &place.name, &lookup).expect_err("no room");
    assert_eq!(error.errno(), Errno::AGAIN);
    assert!(asked.elapsed() < std::time::Duration::from_secs(3));
}

#[test]
fn the_second_registry_is_used_when_the_first_has_nothing() {
    let place = Place::new();
    let _listener = place.serve();
    let empty = tempfile::tempdir().expect("a directory");
    let runtime_dirs = vec![
        empty.path().join("absent"),
        empty.path().to_owned(),
        place.dir.path().to_owned(),
    ];
    let lookup = Lookup {
        runtime_dirs,
        ..Lookup::default()
    };
    let answer = connect(&place.read, &place.name, &lookup).expect("an answer");
    assert!(answer.found().is_some());
}

#[test]
fn both_routes_together_work_on_this_kernel_whatever_it_is() {
    let place = Place::new();
    let options = Options {
        kernel: true,
        ..place.options()
    };
    let listener = Listener::bind(&place.write, &place.name, &options).expect("bound");
    let lookup = Lookup {
        kernel: true,
        ..place.lookup()
    };
    let answer = connect(&place.read, &place.name, &lookup).expect("an answer");
    let client = answer.found().expect("connected");
    let server = listener.accept().expect("accepted").expect("a client");
    assert_eq!(client.route(), listener.routes()[0]);
    assert_eq!(server.route(), client.route());
}

#[test]
fn a_lock_that_others_hold_on_a_directory_they_may_read_keeps_no_server_waiting() {
    let place = Place::new();
    fs::create_dir(place.registry()).expect("made");
    fs::set_permissions(place.registry(), fs::Permissions::from_mode(0o755)).expect("changed");
    let others = fs::File::open(place.registry()).expect("opened");
    flock(&others, FlockOperation::LockExclusive).expect("locked");
    let listener = place.serve();
    place.connect(&place.read);
    drop(listener);
    assert!(place.folders().is_empty());
    let lock = fs::metadata(place.registry().join("lock")).expect("examined");
    assert_eq!(lock.permissions().mode() & 0o777, 0o600);
}

#[test]
fn entries_of_killed_servers_are_named_and_removed_and_no_others() {
    let (place, dead) = (Place::new(), Place::new());
    let dir = place.dir.path();
    assert_eq!(stale_entries(dir).expect("no registry"), [] as [PathBuf; 0]);
    let _listener = place.serve();
    // Of another pipe, in the same registry.
    let options = place.options();
    let gone = Listener::bind(&dead.write, &place.name, &options).expect("bound");
    let entry = place.folders().into_iter().find(|path| {
        let number = dead.write.as_fd();
        let inode = rustix::fs::fstat(number).expect("examined").st_ino;
        path.to_string_lossy().contains(&inode.to_string())
    });
    let entry = entry.expect("a folder").join("service");
    drop(gone);
    fs::create_dir(entry.parent().expect("a folder")).expect("made");
    drop(UnixListener::bind(&entry).expect("bound"));
    fs::set_permissions(&entry, fs::Permissions::from_mode(0o600)).expect("changed");
    assert_eq!(stale_entries(dir).expect("read"), [entry.as_path()]);
    assert!(entry.exists());
    assert_eq!(
        remove_stale_entries(dir).expect("removed"),
        [entry.as_path()]
    );
    assert_eq!(place.folders().len(), 1, "only that of the living server");
    assert_eq!(stale_entries(dir).expect("read"), [] as [PathBuf; 0]);
    place.connect(&place.read);
}

#[test]
fn a_registry_whose_path_cannot_be_followed_is_no_service_and_not_the_end_of_the_search() {
    let place = Place::new();
    let loops = place.dir.path().join("loops");
    symlink(&loops, &loops).expect("linked");
    let too_long = place.dir.path().join("x".repeat(300));
    for (dir, cause) in [
        (loops.join("run"), "symbolic links"),
        (too_long, "too long"),
    ] {
        let mut lookup = place.lookup();
        lookup.runtime_dirs.insert(0, dir);
        let answer = connect(&place.read, &place.name, &lookup).expect("an answer");
        let Answer::NoService(NoService::Untrusted(why)) = answer else {
            panic!("{answer:?}")
        };
        assert!(why.contains(cause), "{why}");
        let _listener = place.serve();
        let answer = connect(&place.read, &place.name, &lookup).expect("an answer");
        assert!(answer.found().is_some(), "{cause}");
    }
}

/// The program of this test again, with `/proc` replaced by an empty folder.
#[test]
fn without_proc_client_and_server_hear_the_cause() {
    const INSIDE: &str = "UPGRADE_TEST_RUNTIME_DIR";
    if let Some(dir) = std::env::var_os(INSIDE) {
        let place = Place::new();
        let error = place.bind(&place.write).expect_err("no /proc");
        assert!(matches!(error, Error::NoProc), "{error}");
        // Standard input is a pipe that a server outside offers a service on.
        let lookup = Lookup {
            kernel: false,
            runtime_dirs: vec![dir.into()],
            ..Lookup::default()
        };
        let answer = connect(std::io::stdin(), &place.name, &lookup).expect("an answer");
        assert!(
            matches!(answer, Answer::NoService(NoService::NoProc)),
            "{answer:?}"
        );
        return;
    }
    let place = Place::new();
    let _listener = place.serve();
    let script = "mount -t tmpfs none /proc && exec \"$0\" --exact without_proc_client_and_server_hear_the_cause";
    let unshare: &[_] = match rustix::process::geteuid().is_root() {
        true => &["--mount"],
        false => &["--mount", "--map-root-user"],
    };
    let output = std::process::Command::new("unshare")
        .args(unshare)
        .args(["sh", "-c", script])
        .arg(std::env::current_exe().expect("this program's path"))
        .env(INSIDE, place.dir.path())
        .stdin(place.read.try_clone().expect("cloned"))
        .output()
        .expect("unshare runs (package util-linux)");
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
