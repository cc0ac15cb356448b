//! What the driver offers besides data: where threads run, whether partitions are looked for.

use std::fs;
use std::io::Write;
use std::path::Path;

use crate::common::{Sandbox, sandbox};
use crate::data::{serve, stat};
use crate::{MIB, run};
use testkit::server::Server;

/// Where the thread of a queue may run, as the scheduler sees it: `0-3,5`.
fn allowed(server: &Server, queue: usize) -> Vec<usize> {
    let tasks = fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap();
    let task = tasks
        .map(|task| task.unwrap().path())
        .find(|task| {
            let name = fs::read_to_string(task.join("comm")).unwrap();
            name.starts_with("ublk") && name.trim().ends_with(&format!("q{queue}"))
        })
        .unwrap();
    let status = fs::read_to_string(task.join("status")).unwrap();
    let list = (status.lines())
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    let number = |text: &str| text.trim().parse::<usize>().unwrap();
    list.split(',')
        .flat_map(|range| match range.split_once('-') {
            Some((first, last)) => number(first)..=number(last),
            None => number(range)..=number(range),
        })
        .collect()
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn queue_threads_run_where_the_requests_of_their_queue_come_from() {
    let lab = sandbox();
    let online = std::thread::available_parallelism().unwrap().get();
    let queues = online.min(2);
    let queues_flag = queues.to_string();
    let several = &["--queues", &queues_flag][..];
    let wanted = [several, &["--ublk-affinity"]].concat();
    queue_threads_keep_to_their_queues(&lab, &wanted, queues, online);
    if queues > 1 {
        queue_threads_keep_to_their_queues(&lab, several, queues, online);
    }
    let one = &["--queues", "1"][..];
    let unwanted = [several, &["--ublk-affinity=no"]].concat();
    let told_otherwise = [several, &["--cpus", "0"]].concat();
    for args in [one, &unwanted, &told_otherwise] {
        let (server, _) = serve(&lab, "far", "mem:16M", args);
        assert!(stat(&lab, "far")["ublk"]["affinity"].is_null(), "{args:?}");
        server.stop().unwrap();
    }
    lab.is_clean();
}

/// Serves with `args` on a machine with so many processors, and looks where the threads may run.
fn queue_threads_keep_to_their_queues(lab: &Sandbox, args: &[&str], queues: usize, online: usize) {
    let (server, disk) = serve(lab, "near", "mem:16M", args);
    let told = stat(lab, "near")["ublk"]["affinity"].clone();
    assert_eq!(told.as_array().unwrap().len(), queues);
    let mut all = Vec::new();
    for queue in 0..queues {
        let told: Vec<usize> = (told[queue].as_str().unwrap().split(','))
            .map(|cpu| cpu.parse().unwrap())
            .collect();
        // What the block layer says of the same queue.
        let name = disk.file_name().unwrap().to_str().unwrap();
        let sysfs = format!("/sys/block/{name}/mq/{queue}/cpu_list");
        let sysfs = fs::read_to_string(sysfs).unwrap();
        let sysfs: Vec<usize> = (sysfs.trim().split(", "))
            .map(|cpu| cpu.parse().unwrap())
            .collect();
        assert_eq!(told, sysfs);
        let on: Vec<usize> = (told.iter().copied().filter(|cpu| *cpu < online)).collect();
        let may: Vec<usize> = (allowed(&server, queue).into_iter())
            .filter(|cpu| *cpu < online)
            .collect();
        assert_eq!(may, on, "queue {queue}");
        all.extend(on);
    }
    all.sort_unstable();
    assert_eq!(all, (0..online).collect::<Vec<_>>());
    server.stop().unwrap();
}

/// A boot sector with one partition of 1 MiB behind the first.
fn partition(path: &Path) {
    let mut sector = [0; 512];
    // Type, first sector, sectors; the other bytes are of the time of cylinders.
    sector[446 + 4] = 0x83;
    sector[446 + 8..446 + 12].copy_from_slice(&2048u32.to_le_bytes());
    sector[446 + 12..446 + 16].copy_from_slice(&2048u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    let mut file = fs::File::options().write(true).open(path).unwrap();
    file.write_all(&sector).unwrap();
}

#[test]
#[ignore = "needs root and /dev/ublk-control"]
fn partitions_are_looked_for_unless_that_is_not_wanted() {
    let lab = sandbox();
    let image = lab.image("disk.img", 16 * MIB);
    partition(&image);
    let spec = format!("file:{}", image.display());
    for (args, wanted) in [(&[][..], true), (&["--no-partition-scan"][..], false)] {
        let (server, disk) = serve(&lab, "parts", &spec, args);
        let name = disk.file_name().unwrap().to_str().unwrap();
        let found = Path::new(&format!("/sys/block/{name}/{name}p1")).exists();
        assert_eq!(found, wanted, "{args:?}");
        // BLKRRPART finds them in any case.
        run("blockdev", &["--rereadpt", disk.to_str().unwrap()]).unwrap();
        assert!(Path::new(&format!("/sys/block/{name}/{name}p1")).exists());
        server.stop().unwrap();
    }
    lab.is_clean();
}
