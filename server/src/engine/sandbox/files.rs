//! What is left of the file system, by Landlock (Linux 5.13).
//!
//! Landlock also decides about opening and unlinking by io_uring, and about what lies behind `/proc/PID`: the memory
//! and the descriptors of processes outside are out of reach. It knows nothing of changing modes, owners and extended
//! attributes; the filter of system calls forbids those.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};
use rustix::thread::CapabilitySet;

/// The newest kernel's kinds of access; older ones take what they know.
const NEWEST: ABI = ABI::V10;

/// What may be done at a path and below it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Files are read.
    Read,
    /// A file or device is read and written.
    Data,
    /// Files and sockets are made, read, written and removed.
    Folder,
    /// Devices are read and written, and sockets bound to them (Linux with fd addresses); files are removed.
    Devices,
    /// Sockets are connected to.
    Sockets,
    /// Files and sockets are removed.
    RemoveFiles,
    /// Empty folders are removed, after a look.
    RemoveFolders,
    /// As for `RemoveFolders`; and folders are moved from here to where [`Spares`](Self::Spares) are.
    MoveFolders,
    /// Folders are moved to here. Landlock lets no folder be moved to where more may be done with it (Linux 5.19), and
    /// here more may be done than with `MoveFolders`. So only a [`Spare`](Self::Spare) can be moved.
    Spares,
    /// As for `Folder`, wherever the folder is moved; and all that may be done at `Spares`.
    Spare,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        let data = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
        let spares = AccessFs::ReadDir | AccessFs::MakeDir | AccessFs::Refer;
        match self {
            Self::Read => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Data => data | AccessFs::IoctlDev,
            Self::Folder => {
                data | AccessFs::ReadDir
                    | AccessFs::MakeReg
                    | AccessFs::MakeSock
                    | AccessFs::RemoveFile
            }
            Self::Devices => {
                data | AccessFs::IoctlDev | AccessFs::MakeSock | Self::RemoveFiles.rights()
            }
            Self::Sockets => AccessFs::ResolveUnix.into(),
            Self::RemoveFiles => AccessFs::RemoveFile.into(),
            Self::RemoveFolders => AccessFs::ReadDir | AccessFs::RemoveDir,
            Self::MoveFolders => Self::RemoveFolders.rights() | AccessFs::Refer,
            Self::Spares => spares,
            Self::Spare => Self::Folder.rights() | spares,
        }
    }
}

/// What a server goes on reaching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Paths that exist; others are passed over.
    pub paths: Vec<(PathBuf, Access)>,
    /// Whether there are block devices, which others may mount.
    pub has_block_devices: bool,
    /// Commands to the ublk driver for devices of administrators.
    pub administers_devices: bool,
    /// Servers of a storage, to which connections are made again and again.
    pub servers: Servers,
}

/// How servers of storages are reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Servers {
    /// By the network.
    pub network: bool,
    /// By sockets with a path, each in a folder with [`Access::Sockets`].
    pub sockets: bool,
}

impl Reach {
    /// The capabilities that are kept, if there are any.
    pub(super) fn capabilities(&self) -> CapabilitySet {
        // Notes, sockets and devices may belong to another user than root, who owns less without the first. The
        // second is asked for when rings are made, by kernels that count their memory.
        let common = CapabilitySet::DAC_OVERRIDE | CapabilitySet::IPC_LOCK;
        match self.administers_devices {
            true => common | CapabilitySet::SYS_ADMIN,
            false => common,
        }
    }
}

/// What rules of this kernel leave open that those of newer ones do not.
pub(super) fn lacks(reach: &Reach) -> Vec<String> {
    // LANDLOCK_CREATE_RULESET_VERSION (include/uapi/linux/landlock.h) asks for the version.
    let (nothing, no_bytes, ask_version) = (std::ptr::null::<u8>(), 0usize, 1u32);
    // SAFETY: with this flag the call takes no memory.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            nothing,
            no_bytes,
            ask_version,
        )
    };
    // Without Landlock all of it is missing, and told. What else older rules do not know is TCP and signals, which the
    // filter of system calls forbids.
    let lacks = [
        (6, "abstract sockets of others (Linux 6.12)"),
        (9, "sockets of others with a path (Linux 7.1)"),
    ];
    let lacks = lacks
        .into_iter()
        .filter(|(since, _)| (1..*since).contains(&version));
    // Datagrams are what the filter of system calls cannot tell, unless it refuses their sockets because it lets pass
    // connections, which are made again.
    let how = match reach.servers.sockets {
        true => "connect to",
        false => "send datagrams to",
    };
    lacks
        .map(|(_, what)| format!("it can {how} {what}"))
        .collect()
}

/// A set of rules that a thread can put itself under.
#[derive(Debug)]
pub(super) struct Files(OwnedFd);

impl Files {
    /// # Errors
    ///
    /// Why the kernel has no rules for files.
    pub(super) fn new(reach: &Reach) -> Result<Self, String> {
        let rules = rules(reach).map_err(|error| error.to_string())?;
        let rules: Option<OwnedFd> = rules.into();
        rules.map(Self).ok_or_else(|| {
            "no Landlock here (CONFIG_SECURITY_LANDLOCK, lsm= of the kernel's command line, the seccomp profile of \
             a container)"
                .to_owned()
        })
    }

    /// Puts the calling thread under the rules. May be called in a signal handler.
    pub(super) fn apply(&self) -> io::Result<()> {
        let (fd, no_flags): (RawFd, u32) = (self.0.as_raw_fd(), 0);
        // SAFETY: the call has no pointers.
        match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, fd, no_flags) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn rules(reach: &Reach) -> Result<landlock::RulesetCreated, RulesetError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(match reach.servers.network {
            true => AccessNet::BindTcp.into(),
            false => AccessNet::from_all(NEWEST),
        })?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for (path, access) in &reach.paths {
        let Ok(place) = PathFd::new(path) else {
            continue;
        };
        let rights = match path.is_dir() {
            true => access.rights(),
            false => access.rights() & AccessFs::from_file(NEWEST),
        };
        rules = rules.add_rule(PathBeneath::new(place, rights))?;
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_spare_folders_are_moved_and_only_home() {
        let temp = tempfile::tempdir().unwrap();
        let path = |name: &str| temp.path().join(name);
        for folder in ["exports/mine", "exports/other", "spares/0"] {
            fs::create_dir_all(path(folder)).unwrap();
        }
        let reach = Reach {
            paths: vec![
                (path("exports/mine"), Access::Spare),
                (path("exports"), Access::MoveFolders),
                (path("spares"), Access::Spares),
            ],
            ..Reach::default()
        };
        let files = Files::new(&reach).unwrap();
        // On a thread of its own: there is no way back.
        let confined = || {
            rustix::thread::set_no_new_privs(true).unwrap();
            files.apply().unwrap();
            for (from, to) in [
                ("exports/other", "spares/1"),
                ("exports/other", "exports/another"),
                ("exports/mine", "exports/another"),
                ("exports/other", "exports/mine/other"),
                ("spares/0", "exports/another"),
            ] {
                assert!(fs::rename(path(from), path(to)).is_err(), "{from} to {to}");
            }
            fs::write(path("exports/other/note"), "x").unwrap_err();
            fs::write(path("exports/mine/note"), "x").unwrap();
            fs::rename(path("exports/mine"), path("spares/1")).unwrap();
            fs::write(path("spares/1/note"), "y").unwrap();
        };
        std::thread::scope(|scope| scope.spawn(confined).join().unwrap());
        assert!(path("exports/other").exists());
        // A command outside may use it again, for another export.
        fs::rename(path("spares/1"), path("exports/next")).unwrap();
    }
}
