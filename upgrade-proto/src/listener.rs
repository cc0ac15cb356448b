//! The server's side.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::address::{FdAddress, Name};
use crate::connect::{Connection, Route};
use crate::error::OrCannot;
use crate::object::Key;
use crate::registry::{self, Published};
use crate::{Error, socket};

/// How a service is offered.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether the kernel's route is tried.
    pub kernel: bool,
    /// The runtime directory whose registry gets an entry; `None` publishes nothing.
    pub runtime_dir: Option<PathBuf>,
    /// The object's key, for a server whose descriptor is of another object: the ublk server binds by the character
    /// device, with the key of its disk from [`Key::of_disk`]. `None`: [`Key::of`].
    pub key: Option<Key>,
    /// Connections that can wait to be accepted, for each route.
    pub backlog: i32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kernel: true,
            runtime_dir: registry::own_runtime_dir(),
            key: None,
            backlog: 16,
        }
    }
}

/// An entry in the registry.
#[derive(Debug)]
enum Entry {
    /// Which this process removes.
    Own(Published),
    /// Which another process made.
    Given(OwnedFd),
}

impl Entry {
    fn socket(&self) -> &OwnedFd {
        match self {
            Self::Own(published) => published.socket(),
            Self::Given(socket) => socket,
        }
    }
}

/// A service offered on an object. Dropping it ends the offer, but not the accepted connections.
#[derive(Debug)]
pub struct Listener {
    epoll: OwnedFd,
    kernel: Option<OwnedFd>,
    registry: Option<Entry>,
    entry: Option<PathBuf>,
    registry_error: Option<Error>,
}

impl Listener {
    /// Offers the service `name` of the object behind `fd`.
    ///
    /// The kernel's address is tried first. The registry gets an entry in either case, since a client may run in a
    /// container where seccomp or a user-space kernel has no fd addresses. One open route is enough: see
    /// [`Listener::routes`]. A kernel with fd addresses that refuses this caller is an error, and so is another server
    /// on either route. The descriptor is not kept.
    pub fn bind(fd: impl AsFd, name: &Name, options: &Options) -> Result<Self, Error> {
        Self::bind_as(fd.as_fd(), name, options, None)
    }

    /// As [`Listener::bind`], with an entry that another process has made with [`publish`](crate::publish), as this one
    /// may not write to the registry. Clients see this process as the server.
    pub fn with_entry(
        fd: impl AsFd,
        name: &Name,
        options: &Options,
        entry: OwnedFd,
    ) -> Result<Self, Error> {
        // Who listened last is whom clients connect to (unix(7), SO_PEERCRED).
        rustix::net::listen(&entry, options.backlog).or_cannot("listen on", "the entry")?;
        Self::bind_as(fd.as_fd(), name, options, Some(entry))
    }

    fn bind_as(
        fd: BorrowedFd<'_>,
        name: &Name,
        options: &Options,
        given: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let address = FdAddress::new(fd.as_raw_fd(), name.clone())?;
        let listening = match options.kernel {
            true => socket::listen(&address.to_string(), options.backlog),
            false => Err(Errno::NOENT),
        };
        let kernel = match listening {
            Err(Errno::ADDRINUSE) => {
                return Err(Error::InUse {
                    name: name.to_string(),
                    object: format!("descriptor {}", fd.as_raw_fd()),
                });
            }
            Err(
                Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::OPNOTSUPP,
            ) if options.runtime_dir.is_some() || given.is_some() => None,
            other => Some(other.or_cannot("bind", &address)?),
        };
        let publish = |dir| {
            let key = options.key.map_or_else(|| Key::of(fd), Ok)?;
            let published = Published::publish(dir, &key, name, options.backlog)?;
            Ok((published, dir.join(registry::entry_path(&key, name))))
        };
        let runtime_dir = options.runtime_dir.as_deref().filter(|_| given.is_none());
        let (published, registry_error) = match runtime_dir.map(publish) {
            None => (None, None),
            Some(Ok(published)) => (Some(published), None),
            Some(Err(error)) if kernel.is_none() || matches!(error, Error::InUse { .. }) => {
                return Err(error);
            }
            Some(Err(error)) => (None, Some(error)),
        };
        let (published, entry) = published.unzip();
        let registry = (given.map(Entry::Given)).or(published.map(Entry::Own));
        let epoll = poll_both(kernel.as_ref(), registry.as_ref().map(Entry::socket))
            .or_cannot("watch", address)?;
        Ok(Self {
            epoll,
            kernel,
            registry,
            entry,
            registry_error,
        })
    }

    /// The routes that are open to clients, the kernel's first. Never empty.
    pub fn routes(&self) -> Vec<Route> {
        let kernel = self.kernel.as_ref().map(|_| Route::Kernel);
        let registry = self.registry.as_ref().map(|_| Route::Registry);
        kernel.into_iter().chain(registry).collect()
    }

    /// The socket of the registry's entry, if there is one.
    pub fn entry(&self) -> Option<&Path> {
        self.entry.as_deref()
    }

    /// Why the registry has no entry, if one was wanted and only the kernel's route is open.
    pub fn registry_error(&self) -> Option<&Error> {
        self.registry_error.as_ref()
    }

    /// Accepts a connection; `None` if there is none. Does not block: poll the descriptor of [`AsFd`] for reading.
    pub fn accept(&self) -> Result<Option<Connection>, Error> {
        let routes = [
            (Route::Kernel, self.kernel.as_ref()),
            (Route::Registry, self.registry.as_ref().map(Entry::socket)),
        ];
        for (route, listening) in routes {
            let Some(listening) = listening else { continue };
            match accept_with(listening, SocketFlags::CLOEXEC) {
                Ok(stream) => return Connection::new(stream, route, "the client").map(Some),
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(errno) => return Err(Error::system("accept", "a client", errno)),
            }
        }
        Ok(None)
    }
}

impl AsFd for Listener {
    /// Readable while a client waits on either route. For polling only.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn poll_both(kernel: Option<&OwnedFd>, registry: Option<&OwnedFd>) -> Result<OwnedFd, Errno> {
    let both = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for socket in kernel.into_iter().chain(registry) {
        epoll::add(
            &both,
            socket,
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )?;
    }
    Ok(both)
}
