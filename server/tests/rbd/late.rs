//! A write that is still on its way to the cluster when its server dies.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use crate::common::*;
use crate::{ARGS, Image, connect, preloaded, serve};

/// A library that has a process connect to another port than it wanted to.
const DETOUR: &str = r#"
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

int connect(int fd, const struct sockaddr *to, socklen_t len) {
    int (*real)(int, const struct sockaddr *, socklen_t);
    *(void **)&real = dlsym(RTLD_NEXT, "connect");
    struct sockaddr_in other;
    if (len < sizeof other || to->sa_family != AF_INET)
        return real(fd, to, len);
    memcpy(&other, to, sizeof other);
    if (ntohs(other.sin_port) == atoi(getenv("DETOUR_FROM")))
        other.sin_port = htons(atoi(getenv("DETOUR_TO")));
    return real(fd, (struct sockaddr *)&other, sizeof other);
}
"#;

/// What a client sends, from some time on, and where it was to go.
#[derive(Default)]
struct Held {
    is_holding: bool,
    bytes: Vec<u8>,
    to: Option<TcpStream>,
    /// Whether the other side has said something since the bytes were let go.
    answered: bool,
}

/// A network between clients and a storage daemon that can be slow.
#[derive(Clone)]
struct Network {
    port: u16,
    held: Arc<Mutex<Held>>,
}

impl Network {
    fn to(daemon: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let this = Self {
            port: listener.local_addr().unwrap().port(),
            held: Arc::default(),
        };
        let network = this.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let daemon = TcpStream::connect(("127.0.0.1", daemon)).unwrap();
                let back = (daemon.try_clone().unwrap(), client.try_clone().unwrap());
                let (there, answers) = (network.clone(), network.clone());
                std::thread::spawn(move || there.pass_on(client, &daemon));
                std::thread::spawn(move || answers.bring_back(back.0, back.1));
            }
        });
        this
    }

    fn pass_on(&self, mut client: TcpStream, mut daemon: &TcpStream) {
        let mut bytes = [0; 65536];
        while let Ok(len @ 1..) = client.read(&mut bytes) {
            let mut held = self.held.lock().unwrap();
            if held.is_holding {
                held.bytes.extend(&bytes[..len]);
                held.to = Some(daemon.try_clone().unwrap());
            } else {
                daemon.write_all(&bytes[..len]).unwrap();
            }
        }
        // What is held goes later, and its connection stays.
        if self.held.lock().unwrap().to.is_none() {
            let _ = daemon.shutdown(Shutdown::Both);
        }
    }

    fn bring_back(&self, mut daemon: TcpStream, mut client: TcpStream) {
        let mut bytes = [0; 65536];
        while let Ok(len @ 1..) = daemon.read(&mut bytes) {
            // A client may be gone.
            let _ = client.write_all(&bytes[..len]);
            let mut held = self.held.lock().unwrap();
            held.answered |= !held.is_holding;
        }
    }

    fn hold(&self) {
        let mut held = self.held.lock().unwrap();
        held.is_holding = true;
        held.answered = false;
    }

    fn has(&self, bytes: &[u8]) -> bool {
        let held = self.held.lock().unwrap();
        held.bytes.windows(bytes.len()).any(|part| part == bytes)
    }

    /// Lets go of what was held, and waits for an answer.
    fn let_go(&self) {
        let mut held = self.held.lock().unwrap();
        held.is_holding = false;
        let bytes = std::mem::take(&mut held.bytes);
        held.to.as_ref().unwrap().write_all(&bytes).unwrap();
        drop(held);
        eventually("the daemon has answered", || {
            self.held.lock().unwrap().answered
        });
    }
}

fn daemon_port() -> u16 {
    let map = crate::ceph(&["osd", "dump", "--format", "json"]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let address = &map["osds"][0]["public_addrs"]["addrvec"][0]["addr"];
    let (_, port) = address.as_str().unwrap().rsplit_once(':').unwrap();
    port.parse().unwrap()
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_write_that_is_on_its_way_when_its_server_dies_changes_nothing_after_its_successors() {
    let image = Image::new("late", "64M");
    let lab = sandbox();
    let from = daemon_port();
    let network = Network::to(from);
    let (library, from, to) = (
        preloaded(&lab, DETOUR),
        from.to_string(),
        network.port.to_string(),
    );
    let env = [
        ("LD_PRELOAD", library.as_str()),
        ("DETOUR_FROM", &from),
        ("DETOUR_TO", &to),
    ];
    let server = lab.serve_with(&[&ARGS[..], &[&image.spec()]].concat(), &env);
    let mut driver = connect(&lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    network.hold();
    driver.memory.put(DATA + 4096, &[2; 512]);
    driver.prepare(T_OUT, 0, &[(512, 0)]);
    eventually("the write is on its way", || network.has(&[2; 512]));
    server.kill().unwrap();
    drop(driver);
    let successor = serve(&lab, &image);
    let mut next = connect(&lab);
    assert_eq!(next.read(0, 512), (OK, vec![1; 512]));
    assert_eq!(next.write(0, &[3; 512]), OK);
    network.let_go();
    // Behind it in the order of the object's placement group.
    assert_eq!(next.write(8, &[4; 512]), OK);
    assert_eq!(next.read(0, 512), (OK, vec![3; 512]), "a late write");
    successor.stop().unwrap();
    lab.is_clean();
}
