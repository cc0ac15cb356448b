//! A filter of system calls, for all threads.
//!
//! It lists what is forbidden. A list of what is allowed would be shorter to reason about, but a call that it
//! lacks makes a server fail while it serves: what the C library and the allocator call changes with their versions,
//! and a storage in a library (librbd) brings its own. The usual weakness of the other way, system calls that did not
//! exist when the list was written, is closed by number: they answer ENOSYS, as on an older kernel.
//!
//! What is forbidden answers EPERM and ends nothing: a mistake here costs a function, not the disk of a guest.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

use super::files::Servers;

/// The last system call that this list was made with (`file_setattr`, Linux 6.17). From 424 on all architectures have
/// the same numbers. The other table of calls of x86 (x32) begins far above.
const NEWEST: u32 = 469;

/// Calls of the same number everywhere that the package libc does not name everywhere.
const BY_NUMBER: [c_long; 5] = [
    452, // fchmodat2
    463, // setxattrat
    466, // removexattrat
    467, // open_tree_attr
    469, // file_setattr
];

/// What no server does once its exports are open.
const FORBIDDEN: &[c_long] = &[
    // Other programs. What clone(2) may do is below.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_migrate_pages,
    libc::SYS_move_pages,
    libc::SYS_tkill,
    libc::SYS_setpriority,
    libc::SYS_ioprio_set,
    // A connected socket of another program, which may do what this process must not: a system bus, say. Listening
    // sockets stay: clients connect to us.
    libc::SYS_connect,
    // Memory and queues that other programs know by name.
    libc::SYS_shmget,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_semget,
    libc::SYS_semctl,
    libc::SYS_msgget,
    libc::SYS_msgctl,
    libc::SYS_msgsnd,
    libc::SYS_msgrcv,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_mq_open,
    libc::SYS_mq_unlink,
    // Namespaces, and what is mounted where.
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    // What Landlock knows nothing of, or not everywhere: files without a path, and what is changed without opening.
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_truncate,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_mknodat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_lsetxattr,
    libc::SYS_fsetxattr,
    libc::SYS_removexattr,
    libc::SYS_lremovexattr,
    libc::SYS_fremovexattr,
    // Other users.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    // The kernel itself, and parts of it that many attacks began with.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_personality,
    libc::SYS_vhangup,
];

/// Calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_mknod,
    libc::SYS_utime,
    libc::SYS_utimes,
    libc::SYS_futimesat,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

// include/uapi/asm-generic/fcntl.h
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
// include/uapi/asm-generic/sockios.h
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;
// include/uapi/linux/fs.h
const FIFREEZE: u64 = 0xc004_5877;
const FITHAW: u64 = 0xc004_5878;
const FS_IOC_SHUTDOWN: u64 = 0x8004_587d;

/// Kinds of namespaces that clone(2) can make.
const NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

/// Puts the calling thread, or all threads, under the filter.
///
/// # Errors
///
/// Why the kernel does not take it.
pub(super) fn confine(all_threads: bool, servers: Servers) -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let program = program(servers).map_err(io::Error::other)?;
    let len = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog {
        len,
        filter: program.as_ptr().cast_mut().cast(),
    };
    // Before Linux 5.16 a filter without the second flag also slows down the branches of all code.
    let mut flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if all_threads {
        flags |= libc::SECCOMP_FILTER_FLAG_TSYNC;
    }
    let mode = libc::SECCOMP_SET_MODE_FILTER;
    // SAFETY: the kernel reads the program, which outlives the call.
    match unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) } {
        0 => Ok(()),
        -1 => Err(io::Error::last_os_error()),
        thread => Err(io::Error::other(format!(
            "thread {thread} has a filter of its own"
        ))),
    }
}

/// The bits of the second argument of socket(2) that are the kind (`SOCK_TYPE_MASK`); others are flags.
const SOCKET_KINDS: u64 = 0xf;

fn program(servers: Servers) -> Result<BpfProgram, seccompiler::BackendError> {
    let [load, jump_if_equal, jump_if_greater, answer] = [
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
        libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K,
        libc::BPF_RET | libc::BPF_K,
    ];
    let step = |code: u32, k: u32, jt: u8, jf: u8| sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt,
        jf,
        k,
    };
    // Flags of clone3(2) are in memory, where a filter does not look: without it the C library uses clone(2).
    let clone3 = u32::try_from(libc::SYS_clone3).unwrap_or_default();
    let enosys = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();
    let mut program = vec![
        // The number of the call is the first word.
        step(load, 0, 0, 0),
        step(jump_if_equal, clone3, 1, 0),
        step(jump_if_greater, NEWEST, 0, 1),
        step(answer, enosys, 0, 0),
    ];
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    let eperm = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let filter = SeccompFilter::new(rules(servers)?, SeccompAction::Allow, eperm, architecture)?;
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Which calls are forbidden, each with the arguments with which it is, if not with all.
fn rules(servers: Servers) -> Result<Rules, seccompiler::BackendError> {
    let is = |argument, op, value| SeccompCondition::new(argument, Len::Dword, op, value);
    let number = |value: libc::c_int| u64::from(value.cast_unsigned());
    let always = [FORBIDDEN, OLD, &BY_NUMBER].concat();
    let mut rules: Rules = always.into_iter().map(|call| (call, Vec::new())).collect();

    // Threads are all that is started.
    let thread = number(libc::CLONE_THREAD);
    let mut clone = vec![SeccompRule::new(vec![is(0, Op::MaskedEq(thread), 0)?])?];
    for namespace in NAMESPACES.map(number) {
        clone.push(SeccompRule::new(vec![is(
            0,
            Op::MaskedEq(namespace),
            namespace,
        )?])?);
    }
    rules.insert(libc::SYS_clone, clone);

    let other_than = |families: &[libc::c_int]| {
        let conditions = families.iter().map(|&family| is(0, Op::Ne, number(family)));
        SeccompRule::new(conditions.collect::<Result<_, _>>()?)
    };
    let local = other_than(&[libc::AF_UNIX])?;
    rules.insert(libc::SYS_socketpair, vec![local]);
    // Which address is connected a filter does not see: so it is the kind of socket that decides. With the network alone
    // none of AF_UNIX, so that no program of this machine is reached; with sockets Landlock decides which.
    let families: &[libc::c_int] = match (servers.network, servers.sockets) {
        (false, _) => &[libc::AF_UNIX],
        (true, false) => &[libc::AF_INET, libc::AF_INET6],
        (true, true) => &[libc::AF_INET, libc::AF_INET6, libc::AF_UNIX],
    };
    let mut sockets = vec![other_than(families)?];
    if servers.sockets {
        // Streams alone: a log or a manager that takes datagrams is not reached.
        for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET, libc::SOCK_RAW] {
            sockets.push(SeccompRule::new(vec![
                is(0, Op::Eq, number(libc::AF_UNIX))?,
                is(1, Op::MaskedEq(SOCKET_KINDS), number(kind))?,
            ])?);
        }
    }
    rules.insert(libc::SYS_socket, sockets);
    if servers.network || servers.sockets {
        rules.remove(&libc::SYS_connect);
    }

    // This process may signal itself; abort(3) does.
    let own = u64::from(std::process::id());
    for call in [
        libc::SYS_kill,
        libc::SYS_tgkill,
        libc::SYS_rt_sigqueueinfo,
        libc::SYS_rt_tgsigqueueinfo,
    ] {
        rules.insert(call, vec![SeccompRule::new(vec![is(0, Op::Ne, own)?])?]);
    }
    let other_process = SeccompRule::new(vec![is(0, Op::Ne, own)?, is(0, Op::Ne, 0)?])?;
    rules.insert(libc::SYS_prlimit64, vec![other_process]);

    // A datagram without a connection, to any socket with a path. Those of sendmsg(2) are in memory, where a filter does
    // not look; Landlock knows them from Linux 7.1.
    let addressed = vec![SeccompRule::new(vec![SeccompCondition::new(
        4,
        Len::Qword,
        Op::Ne,
        0,
    )?])?];
    rules.insert(libc::SYS_sendto, addressed);

    // Where other processes run; for a thread of this one its number is given only by debuggers.
    for call in [
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_setscheduler,
        libc::SYS_sched_setparam,
        libc::SYS_sched_setattr,
    ] {
        rules.insert(call, vec![SeccompRule::new(vec![is(0, Op::Ne, 0)?])?]);
    }

    // A signal for another process when a descriptor becomes ready.
    let mut fcntl = Vec::new();
    for command in [libc::F_SETOWN, F_SETSIG, F_SETOWN_EX] {
        fcntl.push(SeccompRule::new(vec![is(1, Op::Eq, number(command))?])?);
    }
    rules.insert(libc::SYS_fcntl, fcntl);

    // What is typed at the terminal that the server was started at; the same signal by other names; what stops the file
    // system of an image.
    let mut ioctl = Vec::new();
    for request in [
        libc::TIOCSTI,
        libc::TIOCLINUX,
        FIOSETOWN,
        SIOCSPGRP,
        FIFREEZE,
        FITHAW,
        FS_IOC_SHUTDOWN,
    ] {
        ioctl.push(SeccompRule::new(vec![is(1, Op::Eq, request)?])?);
    }
    rules.insert(libc::SYS_ioctl, ioctl);
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    use super::*;

    /// The answer to a call with these first arguments, the others being zero.
    fn errno_of(call: c_long, arguments: [usize; 2]) -> Option<i32> {
        let [first, second] = arguments;
        // SAFETY: the calls of these tests get no memory but null.
        let result = unsafe { libc::syscall(call, first, second, 0, 0, 0, 0) };
        (result == -1)
            .then(io::Error::last_os_error)
            .and_then(|error| error.raw_os_error())
    }

    #[test]
    fn only_the_kinds_of_sockets_that_servers_of_storages_need_are_connected() {
        let eperm = Some(libc::EPERM);
        let socket = |family: libc::c_int| {
            errno_of(libc::SYS_socket, [family.cast_unsigned() as usize, 1]) == eperm
        };
        for (network, sockets) in [(true, false), (false, true), (true, true)] {
            let confined = || {
                confine(false, Servers { network, sockets }).unwrap();
                assert_ne!(errno_of(libc::SYS_connect, [usize::MAX, 0]), eperm);
                assert_eq!(socket(libc::AF_INET), !network);
                assert_eq!(socket(libc::AF_INET6), !network);
                assert_eq!(socket(libc::AF_UNIX), !sockets);
                assert!(socket(libc::AF_NETLINK));
                for kind in [libc::SOCK_DGRAM, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC] {
                    let words = [libc::AF_UNIX, kind].map(|word| word.cast_unsigned() as usize);
                    assert_eq!(errno_of(libc::SYS_socket, words), eperm);
                }
            };
            std::thread::scope(|scope| scope.spawn(confined).join().unwrap());
        }
    }

    #[test]
    fn a_confined_thread_starts_threads_and_no_programs_and_reaches_no_others() {
        // Its own thread: there is no way back.
        let confined = || {
            confine(false, Servers::default()).unwrap();
            let eperm = Some(libc::EPERM);
            let denied = |error: io::Error| assert_eq!(error.raw_os_error(), eperm, "{error}");
            assert_eq!(std::thread::spawn(|| 7).join().unwrap(), 7);
            denied(Command::new("/bin/true").spawn().unwrap_err());
            denied(UdpSocket::bind("127.0.0.1:0").unwrap_err());
            std::os::unix::net::UnixStream::pair().unwrap();
            assert_eq!(errno_of(libc::SYS_execve, [0, 0]), eperm);
            assert_eq!(errno_of(libc::SYS_ptrace, [0, 0]), eperm);
            assert_eq!(errno_of(libc::SYS_connect, [0, 0]), eperm);
            assert_eq!(errno_of(libc::SYS_kill, [1, 0]), eperm);
            let own = std::process::id() as usize;
            assert_eq!(errno_of(libc::SYS_kill, [own, 0]), None);
            assert_eq!(errno_of(libc::SYS_sched_setaffinity, [1, 0]), eperm);
            let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
            let socket = socket.as_raw_fd().cast_unsigned() as usize;
            assert_eq!(errno_of(libc::SYS_fcntl, [socket, 8]), eperm, "F_SETOWN");
            assert_eq!(errno_of(libc::SYS_ioctl, [socket, 0x8901]), eperm);
            assert_eq!(errno_of(libc::SYS_fcntl, [socket, 1]), None, "F_GETFD");
            let new_process = libc::SIGCHLD as usize;
            assert_eq!(errno_of(libc::SYS_clone, [new_process, 0]), eperm);
            let sockets = (libc::CLONE_THREAD | libc::CLONE_NEWNET) as usize;
            assert_eq!(errno_of(libc::SYS_clone, [sockets, 0]), eperm);
            for unknown in [c_long::from(NEWEST) + 1, 1000, 1 << 30] {
                assert_eq!(errno_of(unknown, [0, 0]), Some(libc::ENOSYS), "{unknown}");
            }
        };
        std::thread::spawn(confined).join().unwrap();
    }
}
