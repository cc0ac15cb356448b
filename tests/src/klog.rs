//! What counts as trouble in a kernel log.

/// Pieces of text that a healthy kernel never prints.
const TROUBLE: [&str; 15] = [
    "BUG: ",
    "kernel BUG at",
    "Oops: ",
    "Kernel panic",
    "WARNING: ",
    "INFO: task ",
    "INFO: possible ",
    "INFO: trying to register non-static key",
    "general protection fault",
    "nable to handle kernel",
    "stack segment",
    "double fault",
    "detected stall",
    "self-detected stall",
    "UBSAN: ",
];

/// Parts of the names of functions of the series, in reports of data races.
const OURS: [&str; 4] = ["ringbuffer", "unix_anchor", "unix_fd_addr", "pipe_"];

/// Races of the kernel without the series, in functions that these touch: a pipe's reader looks at both
/// indexes at once, without the lock, while a writer moves one of them.
const THEIRS: [&str; 2] = [
    "anon_pipe_read / anon_pipe_write",
    "anon_pipe_write / anon_pipe_read",
];

/// The lines that say that something is wrong with the kernel, in order.
pub fn trouble<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    lines
        .into_iter()
        .filter(|line| is_trouble(line))
        .map(|line| line.trim().to_owned())
        .collect()
}

fn is_trouble(line: &str) -> bool {
    // "INFO: task fio:12 blocked for more than 122 seconds" is trouble, other
    // remarks about tasks are not.
    if line.contains("INFO: task ") {
        return line.contains("blocked");
    }
    // Races between two parts of the kernel that the series do not touch are not theirs.
    if let Some((_, race)) = line.split_once("BUG: KCSAN: ") {
        let has = |names: &[&str]| names.iter().any(|name| race.contains(name));
        return has(&OURS) && !has(&THEIRS);
    }
    TROUBLE.iter().any(|needle| line.contains(needle))
}

/// The message of one record of `/dev/kmsg`, if the kernel itself wrote it.
///
/// A record is `priority,sequence,time,flags;message`, followed by lines of
/// key and value; a priority of 8 and more marks text written by a process.
pub fn kernel_message(record: &str) -> Option<&str> {
    let (head, message) = record.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    if priority >= 8 {
        return None;
    }
    message.lines().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEALTHY: &str = "\
[    0.000000] Linux version 7.3.4 (gcc) #1 SMP PREEMPT
[    0.000000] Warning: unable to open an initial console.
[    0.512000] EXT4-fs warning (device vda): ext4_update_dynamic_rev:1116
[    0.600000] INFO: lockdep is turned on for this test
[    1.000000] EXT4-fs (ublkb0): mounted filesystem r/w with ordered data mode
[    1.100000] kmemleak: Kernel memory leak detector initialized
[    1.200000] sysrq: Show State";

    #[test]
    fn a_healthy_log_has_no_trouble() {
        assert_eq!(trouble(HEALTHY.lines()), Vec::<String>::new());
    }

    #[test]
    fn every_kind_of_trouble_is_found() {
        let bad = [
            "[  1.0] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "[  1.0] BUG: KASAN: slab-use-after-free in ublk_ch_uring_cmd+0x1/0x2",
            "[  1.0] BUG: sleeping function called from invalid context at mm/util.c:1",
            "[  1.0] kernel BUG at block/blk-mq.c:1234!",
            "[  1.0] Oops: Oops: 0000 [#1] SMP",
            "[  1.0] Kernel panic - not syncing: sysrq triggered crash",
            "[  1.0] WARNING: CPU: 1 PID: 77 at drivers/block/ublk_drv.c:100 ublk_x+0x1",
            "[  1.0] WARNING: drivers/block/ublk_drv.c:100 at ublk_x+0x1/0x2, CPU#1: fio/77",
            "[  1.0] WARNING: possible circular locking dependency detected",
            "[  1.0] WARNING: suspicious RCU usage",
            "[  1.0] INFO: task fio:77 blocked for more than 122 seconds.",
            "[  1.0] INFO: possible recursive locking detected",
            "[  1.0] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:",
            "[  1.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[  1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [fio:77]",
            "[  1.0] UBSAN: array-index-out-of-bounds in fs/x.c:1:2",
            "[  1.0] general protection fault, probably for non-canonical address",
            "[  1.0] Unable to handle kernel paging request at virtual address 0",
        ];
        for line in bad {
            assert_eq!(trouble([line]).len(), 1, "{line}");
        }
    }

    #[test]
    fn data_races_count_where_the_series_are() {
        let ours = "[  1.0] BUG: KCSAN: data-race in pipe_poll / ringbuffer_wakeup";
        let theirs = "[  1.0] BUG: KCSAN: data-race in tick_nohz_next_event / tmigr_update";
        let before = "[  1.0] BUG: KCSAN: data-race in anon_pipe_read / anon_pipe_write";
        let mixed = "[  1.0] BUG: KCSAN: data-race in anon_pipe_write / pipe_ring_read";
        assert_eq!(trouble([ours, theirs, before, mixed]), [ours, mixed]);
    }

    #[test]
    fn only_what_the_kernel_wrote_counts() {
        assert_eq!(
            kernel_message("4,77,1234,-;WARNING: bad\n SUBSYSTEM=block\n"),
            Some("WARNING: bad")
        );
        assert_eq!(kernel_message("12,78,1235,-;WARNING: said a test"), None);
        assert_eq!(kernel_message("cut sho"), None);
    }
}
