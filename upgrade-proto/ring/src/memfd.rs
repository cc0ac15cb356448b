//! Sealed memory files: memory that two processes share without trusting each other.
//!
//! The producer makes a file with the control page, its index page and the data; the consumer makes a file
//! with its index page. Each maps its file for writing once and then seals it: from then on no process can
//! shrink it (which would be SIGBUS), grow it, punch a hole into it, or map it for writing. So each end can
//! write its own pages and nothing else. All pages are allocated before: an allocation that fails at the first
//! access is SIGBUS, too.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals, fcntl_get_seals, fstat,
    fstatfs, memfd_create,
};
use rustix::io::Errno;

use crate::memory::{Memory, Pieces, Role};

/// tmpfs, the file system of a memfd. One of huge pages is on hugetlbfs, where pages can run out under a mapping.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Seals that a file of another process must have before it is mapped.
const SEALS: SealFlags = SealFlags::SHRINK
    .union(SealFlags::GROW)
    .union(SealFlags::FUTURE_WRITE)
    .union(SealFlags::SEAL);

/// Makes a file of this size, to be mapped, then [`seal`]ed, then sent.
pub(crate) fn create(len_bytes: u64) -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create("ring-buffer", flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3.
        Err(Errno::INVAL) => memfd_create("ring-buffer", flags),
        other => other,
    }?;
    fallocate(&file, FallocateFlags::empty(), 0, len_bytes)?;
    Ok(file)
}

/// Makes and maps the producer's file of a ring, and seals it. The consumer's page follows later.
pub(crate) fn create_ring(size: u32) -> Result<(OwnedFd, Memory), Errno> {
    let file = create(Memory::file_bytes(size))?;
    let pieces = Pieces {
        main: file.as_fd(),
        consumer: None,
        own: true,
    };
    let memory = Memory::map(Role::Producer, size, &pieces)?;
    memory.write_control();
    seal(&file)?;
    Ok((file, memory))
}

/// Forbids to change the size, and to write except through mappings that exist.
pub(crate) fn seal(file: impl AsFd) -> Result<(), Errno> {
    fcntl_add_seals(file, SEALS)
}

/// Whether the file is a sealed memory file of this size, so that no access to it can raise SIGBUS.
pub(crate) fn is_fit(file: impl AsFd, len_bytes: u64) -> bool {
    let file = file.as_fd();
    let is_tmpfs = || fstatfs(file).is_ok_and(|fs| u64::try_from(fs.f_type) == Ok(TMPFS_MAGIC));
    // A file of a mounted tmpfs cannot be sealed: EINVAL, or F_SEAL_SEAL alone.
    let is_sealed = || fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS));
    // Sealed, so the size and the allocation cannot change after this.
    let is_whole = || {
        fstat(file).is_ok_and(|stat| {
            let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
            u64::try_from(stat.st_size) == Ok(len_bytes) && blocks.saturating_mul(512) >= len_bytes
        })
    };
    is_tmpfs() && is_sealed() && is_whole()
}
