//! A server under a disk that memory is written out to.

use super::recovery::Disk;
use super::upgrade::{direct, leave, write_block};

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn threads_that_serve_do_not_wait_for_memory_that_they_are_to_write_out() {
    // `PF_MEMALLOC_NOIO` and `PF_LOCAL_THROTTLE` (include/linux/sched.h).
    const FLAGS: u64 = 0x0008_0000 | 0x0010_0000;
    let disk = Disk::new();
    let server = disk.serve(&[]);
    let held = direct(&disk.device());
    write_block(&held, 0, b'a').unwrap();
    let driver = disk.come(&held);
    let mut seen = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
        let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        // The name may have spaces and ends with a bracket; flags are the ninth field.
        let (name, rest) = stat.rsplit_once(')').unwrap();
        let flags: u64 = rest.split_whitespace().nth(6).unwrap().parse().unwrap();
        let name = name.split_once('(').unwrap().1.to_owned();
        seen.push((flags & FLAGS == FLAGS, name));
    }
    // All but the log's, which was there before.
    let mut others = seen.iter().filter(|(is_flusher, _)| !is_flusher);
    assert!(others.all(|(_, name)| name == "log"), "{seen:?}");
    assert!(seen.len() > 4, "{seen:?}");
    leave(driver);
    drop(held);
    server.stop().unwrap();
    disk.lab.is_clean();
}
