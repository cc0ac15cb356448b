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

/// Why a file of another process is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("it is not a memory file")]
    Kind,
    #[error("it is not sealed")]
    Unsealed,
    #[error("it has another size than was announced")]
    Size,
    #[error("parts of it are not allocated")]
    Sparse,
}

/// Checks that the file has this size and that no access to it can raise SIGBUS.
pub(crate) fn check(file: impl AsFd, len_bytes: u64) -> Result<(), Unfit> {
    let file = file.as_fd();
    let kind = fstatfs(file).map_err(|_| Unfit::Kind)?;
    if u64::try_from(kind.f_type) != Ok(TMPFS_MAGIC) {
        return Err(Unfit::Kind);
    }
    // A file of a mounted tmpfs cannot be sealed: EINVAL, or F_SEAL_SEAL alone.
    let seals = fcntl_get_seals(file).map_err(|_| Unfit::Kind)?;
    if !seals.contains(SEALS) {
        return Err(Unfit::Unsealed);
    }
    // Sealed, so the size and the allocation cannot change after this.
    let stat = fstat(file).map_err(|_| Unfit::Kind)?;
    if u64::try_from(stat.st_size) != Ok(len_bytes) {
        return Err(Unfit::Size);
    }
    match u64::try_from(stat.st_blocks) {
        Ok(blocks) if blocks.saturating_mul(512) >= len_bytes => Ok(()),
        _ => Err(Unfit::Sparse),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::ftruncate;

    #[test]
    fn only_sealed_memory_of_the_right_size_is_fit() {
        let file = create(4096).expect("made");
        assert_eq!(check(&file, 4096), Err(Unfit::Unsealed));
        for missing in [
            SealFlags::SHRINK,
            SealFlags::GROW,
            SealFlags::FUTURE_WRITE,
            SealFlags::SEAL,
        ] {
            let file = create(4096).expect("made");
            fcntl_add_seals(&file, SEALS.difference(missing)).expect("sealed");
            assert_eq!(check(&file, 4096), Err(Unfit::Unsealed), "{missing:?}");
        }
        seal(&file).expect("sealed");
        assert_eq!(check(&file, 4096), Ok(()));
        assert_eq!(check(&file, 8192), Err(Unfit::Size));
        let sparse = memfd_create("sparse", MemfdFlags::ALLOW_SEALING).expect("made");
        ftruncate(&sparse, 8192).expect("as long");
        rustix::io::write(&sparse, b"one page").expect("written");
        seal(&sparse).expect("sealed");
        assert_eq!(check(&sparse, 8192), Err(Unfit::Sparse));
        let (read, _write) = std::io::pipe().expect("a pipe");
        assert_eq!(check(read, 0), Err(Unfit::Kind));
        let file = tempfile::tempfile().expect("a file");
        assert!(matches!(check(file, 0), Err(Unfit::Kind | Unfit::Unsealed)));
    }

    #[test]
    fn sealed_memory_cannot_be_written_again_or_punched() {
        let file = create(4096).expect("made");
        seal(&file).expect("sealed");
        assert!(rustix::io::write(&file, b"x").is_err());
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(&file, punch, 0, 4096), Err(Errno::PERM));
        assert!(ftruncate(&file, 0).is_err());
    }
}
