//! Locks that the library has lost. After a time without the cluster it gives a lock back whose cookie it cannot renew, and
//! takes it again, or does not get it; writes fail meanwhile. Whether that happens depends on an address in its memory, so
//! here a library before it gives the lock back.

use testkit::sandbox::Sandbox;
use testkit::server::Server;

use crate::common::*;
use crate::{ARGS, Image, connect, preloaded, rbd, serve};

/// Gives the lock back before a read, once there is a file that says so.
const LOSING: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void *(*find)(void *, const char *);
static int (*read_image)(void *, uint64_t, size_t, char *, void *);
static int (*give_back)(void *);

static int read_and_lose(void *image, uint64_t at, size_t len, char *to, void *done) {
    if (unlink(getenv("LOSE_LOCK")) == 0 && give_back(image) != 0)
        abort();
    return read_image(image, at, len, to, done);
}

void *dlsym(void *library, const char *name) {
    if (!find)
        find = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    void *found = find(library, name);
    if (strcmp(name, "rbd_aio_read") != 0)
        return found;
    *(void **)&read_image = found;
    *(void **)&give_back = find(library, "rbd_lock_release");
    return read_and_lose;
}
"#;

/// A server whose library loses the lock, and a guest of it that has written.
fn serve_losing(lab: &Sandbox, image: &Image) -> (Server, Driver) {
    let (library, file) = (preloaded(lab, LOSING), lab.path("lose"));
    let env = [
        ("LD_PRELOAD", library.as_str()),
        ("LOSE_LOCK", file.to_str().unwrap()),
    ];
    // The file can be seen.
    let args = ["--sandbox=no", &image.spec()];
    let server = lab.serve_with(&[&ARGS[..], &args].concat(), &env);
    let mut driver = connect(lab);
    assert_eq!(driver.write(0, &[1; 512]), OK);
    (server, driver)
}

fn lose(lab: &Sandbox, image: &Image, driver: &mut Driver) {
    let locks = || rbd(&["lock", "ls", &image.0]);
    assert_ne!(locks(), "");
    std::fs::write(lab.path("lose"), "").unwrap();
    assert_eq!(driver.read(0, 512), (OK, vec![1; 512]));
    assert_eq!(locks(), "");
}

fn is_fenced(server: Server) {
    let (status, log) = server.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{log}");
    let words = "another client of the cluster has taken rbd:rbd/";
    assert!(log.contains(words), "{log}");
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_lock_that_no_other_client_has_taken_is_taken_again() {
    let image = Image::new("regained", "64M");
    let lab = sandbox();
    let (server, mut driver) = serve_losing(&lab, &image);
    for round in 2..5 {
        lose(&lab, &image, &mut driver);
        // Several that were refused.
        for at in 0..8_u16 {
            let memory = DATA + 0x2000 * u64::from(at + 1);
            driver.header(memory, T_OUT, u64::from(at + 1) * 8);
            driver.memory.put(memory + 4096, &[round; 512]);
            let buffers = [
                (memory, 16, 0),
                (memory + 4096, 512, 0),
                (memory + 16, 1, WRITE),
            ];
            driver.submit_on(0, 3 * at, &buffers);
        }
        for _ in 0..8 {
            driver.vrings[0].wait(&driver.memory);
        }
        for at in 1..9 {
            assert_eq!(driver.read(8 * at, 512), (OK, vec![round; 512]));
        }
        assert_ne!(rbd(&["lock", "ls", &image.0]), "");
    }
    let log = server.log();
    assert_eq!(
        log.matches("the lock was lost, and is had again").count(),
        3,
        "{log}"
    );
    drop(driver);
    server.stop().unwrap();
    lab.is_clean();
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn a_lock_that_another_client_has_is_not_taken_again() {
    let image = Image::new("passed", "64M");
    let (lab, other) = (sandbox(), sandbox());
    let (server, mut driver) = serve_losing(&lab, &image);
    lose(&lab, &image, &mut driver);
    let next = serve(&other, &image);
    let mut guest = connect(&other);
    assert_eq!(guest.write(0, &[2; 512]), OK);
    assert_eq!(driver.write(0, &[3; 512]), IOERR);
    is_fenced(server);
    assert_eq!(guest.read(0, 512), (OK, vec![2; 512]));
    next.stop().unwrap();
}

/// A guest of the first server believes that the disk is as it left it.
#[test]
#[ignore = "needs a Ceph cluster"]
fn a_lock_that_another_server_had_meanwhile_is_not_taken_again() {
    let image = Image::new("lent", "64M");
    let (lab, other) = (sandbox(), sandbox());
    let (server, mut driver) = serve_losing(&lab, &image);
    lose(&lab, &image, &mut driver);
    let between = serve(&other, &image);
    assert_eq!(connect(&other).write(0, &[2; 512]), OK);
    between.stop().unwrap();
    assert_eq!(driver.write(0, &[3; 512]), IOERR);
    is_fenced(server);
    // Nor is it kept from others.
    let next = serve(&other, &image);
    assert_eq!(connect(&other).read(0, 512), (OK, vec![2; 512]));
    next.stop().unwrap();
}
