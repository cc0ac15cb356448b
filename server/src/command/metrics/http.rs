//! The listener from which Prometheus collects measurements: HTTP, for `GET /metrics` and nothing else.
//!
//! It answers on the machine itself only, a loopback address or a Unix socket, because it does not authenticate clients. What a
//! server has opened before it confines itself stays open: the sandbox allows no new sockets.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::sockopt::{Timeout, set_socket_timeout};

use super::text;
use crate::engine::Accept;
use crate::engine::event_loop::Registration;
use crate::engine::listen;
use crate::engine::sandbox::{Access, Reach};
use crate::engine::socket::{Socket, SocketAccess};
use crate::export::Server;

/// How long a client may take to ask, and to read the answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(5);

/// Clients that are answered at once.
const MAX_CLIENTS: usize = 4;

const MAX_HEAD_BYTES: usize = 8192;

/// Header fields that a request may have.
const MAX_FIELDS: usize = 64;

/// Where to listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A loopback address.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
            Ok(address) => Err(format!(
                "{} is not this machine alone, and anyone who can connect reads the measurements: give 127.0.0.1, \
                 [::1] or the path of a socket",
                address.ip()
            )),
            Err(_) => Err("give 127.0.0.1:PORT, [::1]:PORT or the path of a socket".into()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}/metrics"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// A connection of either kind.
trait Stream: Read + Write + Send + AsFd {
    /// Lets the next read or write last until then at the longest.
    fn set_limit(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(self.as_fd(), timeout, Some(left))?;
        }
        Ok(())
    }
}

impl Stream for TcpStream {}

impl Stream for UnixStream {}

enum Listener {
    Tcp(TcpListener),
    Unix(Socket),
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(socket) => socket.as_fd(),
        }
    }
}

impl Accept for Listener {
    type Client = Box<dyn Stream>;

    fn accept_client(&self) -> io::Result<Option<Self::Client>> {
        let listener = match self {
            Self::Unix(socket) => {
                let client = socket.accept_client()?;
                return Ok(client.map(|stream| Box::new(stream) as _));
            }
            Self::Tcp(listener) => listener,
        };
        match listener.accept() {
            Ok((stream, _)) => Ok(Some(Box::new(stream))),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(error),
            },
        }
    }
}

/// The listener. It is closed when this is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    _listening: Registration,
    /// Where its socket is, to be removed with it.
    folder: Option<PathBuf>,
}

impl MetricsServer {
    /// Listens, and answers each client on a thread of its own.
    ///
    /// # Errors
    ///
    /// When that address cannot be had.
    pub fn start(address: &Address, server: &Arc<Server>) -> Result<Self> {
        let listener = match address {
            Address::Unix(path) => Listener::Unix(Socket::bind(path, &SocketAccess::default())?),
            Address::Tcp(tcp) => {
                let bound = TcpListener::bind(tcp)
                    .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
                Listener::Tcp(bound.with_context(|| format!("--metrics: cannot listen on {tcp}"))?)
            }
        };
        let clients = Arc::<AtomicUsize>::default();
        let server = Arc::clone(server);
        let on_client = move |stream| answer_apart(stream, &server, &clients);
        let listening = listen("metrics", listener, on_client);
        Ok(Self {
            _listening: listening.context("cannot watch the listener for metrics")?,
            folder: match address {
                Address::Unix(path) => path.parent().map(Path::to_owned),
                Address::Tcp(_) => None,
            },
        })
    }

    /// Adds what it still needs in the sandbox.
    pub fn add_reach(&self, reach: &mut Reach) {
        let folder = self.folder.clone();
        (reach.paths).extend(folder.map(|folder| (folder, Access::RemoveFiles)));
    }
}

/// A client that is being answered, until it is dropped.
struct Client(Arc<AtomicUsize>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer_apart(mut stream: Box<dyn Stream>, server: &Arc<Server>, clients: &Arc<AtomicUsize>) {
    let others = clients.fetch_add(1, Ordering::Relaxed);
    let client = Client(Arc::clone(clients));
    if others >= MAX_CLIENTS {
        // It reads an end of file, and asks again at its next interval.
        return;
    }
    let server = Arc::clone(server);
    let answering = std::thread::Builder::new().name("metrics-client".into());
    let spawned = answering.spawn(move || {
        if let Err(error) = answer(&mut *stream, &server) {
            tracing::debug!(%error, "a client that collects metrics");
        }
        drop(client);
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "cannot answer a client that collects metrics");
    }
}

fn answer(stream: &mut dyn Stream, server: &Server) -> io::Result<()> {
    let answer = match read_request(stream)? {
        Some(Asked::Metrics) => respond("200 OK", &text::render(&server.statuses(), &[])),
        Some(Asked::Other) => respond("404 Not Found", "only GET /metrics is answered\n"),
        None => respond("400 Bad Request", "not a request of HTTP\n"),
    };
    write_within(stream, answer.as_bytes())
}

/// Writes all of it, or fails when the client has not read it in time: also one that reads it byte by byte.
fn write_within(stream: &mut dyn Stream, mut answer: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + CLIENT_LIMIT;
    while !answer.is_empty() {
        stream.set_limit(deadline)?;
        match stream.write(answer) {
            Ok(count) => answer = &answer[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn respond(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Metrics,
    Other,
}

/// Reads what a client asks for; `None` if that is no request. A client that sends it byte by byte has no more time than
/// any other.
fn read_request(stream: &mut dyn Stream) -> io::Result<Option<Asked>> {
    let deadline = Instant::now() + CLIENT_LIMIT;
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    loop {
        match parse(&head) {
            Ok(None) if head.len() < MAX_HEAD_BYTES => {}
            Ok(asked) => return Ok(asked),
            Err(_) => return Ok(None),
        }
        stream.set_limit(deadline)?;
        match stream.read(&mut piece) {
            Ok(0) => return Ok(None),
            Ok(count) => head.extend_from_slice(&piece[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// What a request asks for; `None` as long as it is not complete.
fn parse(head: &[u8]) -> Result<Option<Asked>, httparse::Error> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    if request.parse(head)?.is_partial() {
        return Ok(None);
    }
    let path = request.path.and_then(|path| path.split('?').next());
    Ok(Some(match (request.method, path) {
        (Some("GET"), Some("/metrics")) => Asked::Metrics,
        _ => Asked::Other,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_of_this_machine_alone() {
        for good in [
            "127.0.0.1:9100",
            "127.1.2.3:1",
            "[::1]:9100",
            "/run/m.sock",
            "./m",
        ] {
            good.parse::<Address>().unwrap();
        }
        for bad in [
            "0.0.0.0:9100",
            "[::]:9100",
            "192.0.2.1:80",
            "9100",
            "localhost",
            "",
        ] {
            let error = bad.parse::<Address>().unwrap_err();
            assert!(error.contains("127.0.0.1"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_request_is_known_when_it_is_complete() {
        let whole = b"GET /metrics?x HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), Ok(None), "{end}");
        }
        assert_eq!(parse(whole), Ok(Some(Asked::Metrics)));
        for other in ["GET / HTTP/1.1\r\n\r\n", "POST /metrics HTTP/1.1\r\n\r\n"] {
            assert_eq!(parse(other.as_bytes()), Ok(Some(Asked::Other)));
        }
        let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(100));
        for bad in ["\x16\x03\x01", "GET\r\n\r\n", &many] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
