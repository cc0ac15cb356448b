//! A monitor that answers as QEMU's does, without a guest: what `--live` asks it, and which descriptors it sends.

use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

/// A descriptor that was sent, and the text beside it.
struct Sent {
    fd: OwnedFd,
    set: i64,
    opaque: String,
}

/// What the machine behind the monitor has. One disk: `disk`, on the block node `node`.
struct Machine {
    /// What the node says that it opened.
    filename: String,
    /// The block node's name.
    node: String,
    /// The model of the disk's device, if it is plugged in.
    device: Option<String>,
    sent: Vec<Sent>,
    /// How many were ever sent.
    total: usize,
    chardev: bool,
    has_node: bool,
    /// Whether the guest lets go of a disk when it is asked.
    lets_go: bool,
    connection: Option<UnixStream>,
}

/// The monitor, served by a thread that ends with the process.
pub(super) struct Monitor {
    pub socket: PathBuf,
    machine: Arc<Mutex<Machine>>,
    heard: Receiver<String>,
}

fn event() -> Value {
    json!({ "event": "DEVICE_DELETED", "data": { "device": "disk" }, "timestamp": {} })
}

impl Monitor {
    /// Listens at `socket`.
    pub fn start(socket: &Path, filename: &str, node: &str, lets_go: bool) -> Result<Self> {
        let listener = UnixListener::bind(socket)?;
        let machine = Arc::new(Mutex::new(Machine {
            filename: filename.into(),
            node: node.into(),
            device: Some("virtio-blk-pci".into()),
            sent: Vec::new(),
            total: 0,
            chardev: false,
            has_node: true,
            lets_go,
            connection: None,
        }));
        let (sender, heard) = channel();
        let served = Arc::clone(&machine);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // A client that goes away ends its connection, not the monitor.
                if let Err(error) = serve(&stream, &served, &sender) {
                    eprintln!("monitor: {error:#}");
                }
            }
        });
        Ok(Self {
            socket: socket.into(),
            machine,
            heard,
        })
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many descriptors were sent.
    pub fn descriptors_sent(&self) -> usize {
        self.machine().total
    }

    /// How many of them the machine still has.
    pub fn descriptors(&self) -> usize {
        self.machine().sent.len()
    }

    /// The model of the disk that is plugged in.
    pub fn device(&self) -> Option<String> {
        self.machine().device.clone()
    }

    /// Whether the guest lets go of a disk when it is asked.
    pub fn set_lets_go(&self, lets_go: bool) {
        self.machine().lets_go = lets_go;
    }

    /// The guest lets go of the disk, and nobody is there to hear it.
    pub fn lose_disk(&self) {
        self.machine().device = None;
    }

    /// The guest lets go of the disk that it was asked for.
    pub fn let_go_now(&self) -> Result<()> {
        let mut machine = self.machine();
        machine.device = None;
        let connection = machine.connection.as_mut().context("nobody is connected")?;
        writeln!(connection, "{}", event())?;
        Ok(())
    }

    /// Waits for commands from now on.
    pub fn forget_heard(&self) {
        self.heard.try_iter().for_each(drop);
    }

    /// Waits for a command.
    pub fn expect(&self, command: &str, limit: Duration) -> Result<()> {
        loop {
            match self.heard.recv_timeout(limit) {
                Ok(heard) if heard == command => return Ok(()),
                Ok(_) => {}
                Err(error) => bail!("the monitor did not hear {command}: {error}"),
            }
        }
    }
}

fn serve(stream: &UnixStream, machine: &Mutex<Machine>, heard: &Sender<String>) -> Result<()> {
    let lock = || machine.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = stream.try_clone()?;
    lock().connection = Some(stream.try_clone()?);
    writeln!(out, "{}", json!({ "QMP": {} }))?;
    let mut unread = Vec::new();
    let mut fds = Vec::new();
    while receive(stream, &mut unread, &mut fds)? {
        while let Some(end) = unread.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = unread.drain(..=end).collect();
            let asked: Value = serde_json::from_slice(&line)?;
            let command = asked["execute"].as_str().unwrap_or_default().to_owned();
            let mut machine = lock();
            let mut answer = machine.answer(&command, &asked["arguments"], &mut fds);
            answer["id"] = asked["id"].clone();
            writeln!(out, "{answer}")?;
            if command == "device_del" && machine.lets_go {
                machine.device = None;
                writeln!(out, "{}", event())?;
            }
            drop(machine);
            // A test that does not listen any more is not told.
            let _unheard = heard.send(command);
        }
    }
    lock().connection = None;
    Ok(())
}

/// Reads what there is; false at the end.
fn receive(stream: &UnixStream, unread: &mut Vec<u8>, fds: &mut Vec<OwnedFd>) -> Result<bool> {
    let mut bytes = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let count = recvmsg(stream, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?.bytes;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    unread.extend_from_slice(&bytes[..count]);
    Ok(count > 0)
}

impl Machine {
    fn answer(&mut self, command: &str, asked: &Value, fds: &mut Vec<OwnedFd>) -> Value {
        let qdev = "/machine/peripheral/disk/virtio-backend";
        let no = || json!({ "error": { "class": "DeviceNotFound", "desc": "not found" } });
        let value = match command {
            "query-status" => json!({ "running": true, "status": "running" }),
            "query-block" if self.device.as_deref() == Some("virtio-blk-pci") => json!([{
                "device": "",
                "qdev": qdev,
                "inserted": {
                    "node-name": self.node,
                    "drv": "host_device",
                    "ro": false,
                    "cache": { "direct": true, "no-flush": false },
                    "image": { "filename": self.filename },
                },
            }]),
            "query-block" => json!([]),
            "qom-get" => match (asked["property"].as_str(), &self.device) {
                (Some("type"), Some(model)) => json!(model),
                (Some("type"), None) => return no(),
                (Some("parent_bus"), _) => json!("/machine/q35/port0"),
                (Some("addr"), _) => json!("00.0"),
                (Some("bootindex"), _) => json!(-1),
                _ => json!(""),
            },
            "query-memdev" => json!([{ "share": true }]),
            "query-blockstats" => json!([{ "qdev": qdev, "stats": {} }]),
            "query-chardev" if self.chardev => json!([{ "label": "disk-ublkup" }]),
            "query-chardev" => json!([]),
            "query-fdsets" => (self.sent.iter())
                .map(|sent| {
                    json!({
                        "fdset-id": sent.set,
                        "fds": [{ "fd": sent.number(), "opaque": sent.opaque }],
                    })
                })
                .collect(),
            "query-named-block-nodes" if self.has_node => json!([{ "node-name": self.node }]),
            "query-named-block-nodes" => json!([]),
            "add-fd" => {
                let Some(fd) = fds.pop() else { return no() };
                self.total += 1;
                let set = i64::try_from(self.total).unwrap_or_default();
                let opaque = asked["opaque"].as_str().unwrap_or_default().into();
                self.sent.push(Sent { fd, set, opaque });
                let number = self.sent.last().map(Sent::number);
                json!({ "fd": number, "fdset-id": set })
            }
            "remove-fd" => {
                self.sent.retain(|sent| asked["fdset-id"] != sent.set);
                json!({})
            }
            "blockdev-del" => {
                self.has_node = false;
                json!({})
            }
            "blockdev-add" => {
                self.has_node = true;
                json!({})
            }
            "chardev-add" => {
                self.chardev = true;
                json!({})
            }
            "chardev-remove" => {
                self.chardev = false;
                json!({})
            }
            "device_add" => {
                self.device = asked["driver"].as_str().map(str::to_owned);
                json!({})
            }
            _ => json!({}),
        };
        json!({ "return": value })
    }
}

impl Sent {
    fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }
}
