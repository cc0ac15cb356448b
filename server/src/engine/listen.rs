//! The accept loop of every listening socket of a server.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use super::event_loop::{EventLoop, Registration, Then};
use super::open_files::explain;

/// How long a listener that failed is left alone. Out of descriptors, say, the client stays in the
/// queue: without a pause the loop would spin.
const PAUSE: Duration = Duration::from_secs(1);

/// A listening socket that does not block.
pub trait Accept: AsFd + Send + 'static {
    /// What a client's connection is.
    type Client;

    /// Takes one client that waits; `None` if there is none.
    ///
    /// # Errors
    ///
    /// What the system said. It may go better later.
    fn accept_client(&self) -> io::Result<Option<Self::Client>>;
}

impl Accept for UnixListener {
    type Client = UnixStream;

    fn accept_client(&self) -> io::Result<Option<UnixStream>> {
        match self.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                // This client has gone again.
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

/// Accepts the clients of `listener`, until what this returns is dropped: then `on_client` does not
/// run and will not run again, and the listener is closed. `on_client` must not block, as all
/// listeners of the process share one thread.
///
/// An error of accept(2) is logged and tried again after a second; another of the same cause is not
/// logged before a client was accepted. `what` is for those messages.
///
/// # Errors
///
/// When the listener cannot be watched.
pub fn listen<L: Accept>(
    what: impl fmt::Display + Send + 'static,
    listener: L,
    mut on_client: impl FnMut(L::Client) + Send + 'static,
) -> io::Result<Registration> {
    let mut last_error = None;
    EventLoop::get()?.watch(listener, move |listener| match listener.accept_client() {
        Ok(Some(client)) => {
            if last_error.take().is_some() {
                tracing::info!("{what}: clients are accepted again");
            }
            on_client(client);
            Then::Watch
        }
        Ok(None) => Then::Watch,
        Err(error) => {
            let cause = Some(explain(&error));
            if let Some(cause) = cause.as_ref().filter(|_| cause != last_error) {
                tracing::error!("{what}: cannot accept a client: {cause}");
            }
            last_error = cause;
            Then::Pause(PAUSE)
        }
    })
}
