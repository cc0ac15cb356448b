//! The registry as another user, or a server that died, may have left it: links, files of the wrong kind, owner or mode at
//! each step of the path to the socket of a pipe's service.
//!
//! What must hold: a client reaches the socket exactly when every step is a folder, and the last one a socket, of root's
//! or its own that nobody else may write to; a server that publishes there writes to nothing outside.

use std::cell::RefCell;
use std::fs;
use std::io::{PipeReader, PipeWriter};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, mknodat};
use rustix::process::geteuid;
use tempfile::TempDir;
use upgrade_proto::{Answer, Listener, Lookup, Name, Options, connect};

use crate::Script;

/// The service.
const SERVICE: &str = "service";

/// Steps of the path: the runtime directory, the registry, the object, the socket.
const STEPS: usize = 4;

/// Neither root nor this user.
const STRANGER: u32 = 12_345;

struct World {
    reader: PipeReader,
    writer: PipeWriter,
    /// The names of the steps behind the runtime directory.
    names: [String; STEPS - 1],
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// What is in a folder beside the registry's lock.
fn only_entry(folder: &Path) -> String {
    let entries = fs::read_dir(folder).expect("a folder");
    let names = entries.map(|entry| entry.expect("an entry").file_name());
    let mut names = names.filter(|name| name != "lock");
    let name = names.next().expect("an entry");
    assert_eq!(names.next(), None, "more than one entry");
    name.into_string().expect("text")
}

impl World {
    /// Asks a server for the names.
    fn new() -> Self {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let dir = tempfile::tempdir().expect("a directory");
        let name = Name::new(SERVICE).expect("a name");
        let _listener = Listener::bind(&writer, &name, &options(dir.path())).expect("bound");
        let folder = only_entry(dir.path());
        let key = only_entry(&dir.path().join(&folder));
        Self {
            reader,
            writer,
            names: [folder, key, SERVICE.to_owned()],
        }
    }
}

fn options(runtime_dir: &Path) -> Options {
    Options {
        kernel: false,
        runtime_dir: Some(runtime_dir.to_owned()),
        ..Options::default()
    }
}

/// Runs one input: text that begins with `/` is a name, anything else what the registry is like.
pub fn run(input: &[u8]) {
    if let [b'/', name @ ..] = input {
        if let Ok(text) = std::str::from_utf8(name)
            && let Ok(name) = Name::new(text)
        {
            assert_eq!(name.as_str(), text);
            assert!(!text.is_empty() && !text.contains(['/', '\0']) && text != "." && text != "..");
        }
        return;
    }
    WORLD.with_borrow_mut(|world| {
        let world = world.get_or_insert_with(World::new);
        registry(world, &mut Script::new(input));
    });
}

/// A path that is being laid out.
struct Layout {
    dir: TempDir,
    path: PathBuf,
    /// Whether a client may follow it so far.
    is_good: bool,
    /// Whether there is something at its end.
    is_there: bool,
    listeners: Vec<UnixListener>,
    /// Connections that nobody accepts.
    waiting: Vec<OwnedFd>,
}

fn registry(world: &World, script: &mut Script<'_>) {
    let dir = tempfile::tempdir().expect("a directory");
    let outside = dir.path().join("outside");
    fs::create_dir(&outside).expect("made");
    fs::write(outside.join("file"), "outside").expect("written");
    let mut layout = Layout {
        path: dir.path().join("run"),
        dir,
        is_good: true,
        is_there: true,
        listeners: Vec::new(),
        waiting: Vec::new(),
    };
    let runtime_dir = layout.path.clone();
    for name in &world.names {
        layout.folder(script);
        layout.path.push(name);
    }
    layout.socket(script);
    let lookup = Lookup {
        kernel: false,
        runtime_dirs: vec![runtime_dir.clone()],
        timeout: Duration::ZERO,
    };
    let name = Name::new(SERVICE).expect("a name");
    let answer = connect(&world.reader, &name, &lookup);
    let found = matches!(answer, Ok(Answer::Found(_)));
    assert_eq!(found, layout.is_good, "{answer:?}");
    drop(answer);
    // A server publishes if it can. Then clients find it, and it takes its entry away.
    if let Ok(listener) = Listener::bind(&world.writer, &name, &options(&runtime_dir)) {
        let answer = connect(&world.reader, &name, &lookup);
        assert!(matches!(answer, Ok(Answer::Found(_))), "{answer:?}");
        assert!(listener.accept().expect("accepted").is_some());
        drop(listener);
        let answer = connect(&world.reader, &name, &lookup);
        assert!(!matches!(answer, Ok(Answer::Found(_))), "{answer:?}");
    }
    assert_eq!(only_entry(&outside), "file", "written to from the registry");
    let text = fs::read_to_string(outside.join("file"));
    assert_eq!(text.expect("it is there"), "outside");
}

impl Layout {
    /// A folder, or something else where one should be.
    fn folder(&mut self, script: &mut Script<'_>) {
        let what = script.u8();
        if !self.is_there {
            return;
        }
        match what % 16 {
            0 => self.is_there = false,
            1 => {
                let outside = self.dir.path().join("outside");
                symlink(outside, &self.path).expect("made");
                self.is_there = false;
            }
            2 => {
                // A link to a folder that is good itself.
                let real = self.path.with_extension("real");
                fs::create_dir(&real).expect("made");
                symlink(&real, &self.path).expect("made");
                self.is_good = false;
            }
            3 => {
                fs::write(&self.path, "").expect("made");
                self.is_there = false;
            }
            4 => {
                fifo(&self.path);
                self.is_there = false;
            }
            _ => {
                fs::create_dir(&self.path).expect("made");
                self.rights(script, 0o755);
            }
        }
        self.is_good &= self.is_there;
    }

    /// The socket, or something else where it should be.
    fn socket(&mut self, script: &mut Script<'_>) {
        let what = script.u8();
        if !self.is_there {
            return;
        }
        match what % 12 {
            0 => self.is_there = false,
            1 => {
                fs::write(&self.path, "").expect("made");
                self.is_good = false;
            }
            2 => {
                fifo(&self.path);
                self.is_good = false;
            }
            3 => {
                fs::create_dir(&self.path).expect("made");
                self.is_good = false;
            }
            4 => {
                let real = self.dir.path().join("real");
                self.listeners
                    .push(UnixListener::bind(&real).expect("bound"));
                symlink(&real, &self.path).expect("made");
                self.is_good = false;
            }
            5 => {
                // Its server has died.
                drop(self.bind());
                self.is_good = false;
            }
            6 => {
                // Its server accepts nobody.
                let listener = self.bind();
                rustix::net::listen(&listener, 0).expect("listens");
                self.listeners.push(listener);
                while let Some(stream) = connect_now(&self.path) {
                    self.waiting.push(stream);
                }
                self.is_good = false;
            }
            _ => {
                let listener = self.bind();
                self.listeners.push(listener);
                self.rights(script, 0o600);
            }
        }
        self.is_good &= self.is_there;
    }

    /// A socket with a server at the path, which may be longer than an address.
    fn bind(&self) -> UnixListener {
        let folder = fs::File::open(self.path.parent().expect("a folder")).expect("opened");
        let listener = UnixListener::bind(in_folder(&folder)).expect("bound");
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(&self.path, mode).expect("set");
        listener
    }

    /// Owner and mode of what is at the path.
    fn rights(&mut self, script: &mut Script<'_>, usual: u32) {
        let mode = match script.u8() {
            n @ 0..=7 => u32::from(n) | 0o700,
            n @ 8..=15 => u32::from(n - 8) << 3 | 0o700,
            _ => usual,
        };
        fs::set_permissions(&self.path, fs::Permissions::from_mode(mode)).expect("set");
        self.is_good &= mode & 0o022 == 0;
        if script.u8() == 1 && geteuid().is_root() {
            chown(&self.path, Some(STRANGER), None).expect("given away");
            self.is_good = false;
        }
    }
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, 0o600.into(), 0).expect("made");
}

/// The address of the service in an open folder, whose path may be too long for one.
fn in_folder(folder: &fs::File) -> String {
    format!("/proc/self/fd/{}/{SERVICE}", folder.as_raw_fd())
}

/// A connection to a socket that has room for one.
fn connect_now(path: &Path) -> Option<OwnedFd> {
    use rustix::net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.expect("a socket");
    let folder = fs::File::open(path.parent()?).expect("opened");
    let address = SocketAddrUnix::new(in_folder(&folder)).expect("short enough");
    connect(&socket, &address).ok().map(|()| socket)
}
