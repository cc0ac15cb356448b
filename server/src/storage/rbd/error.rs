//! Why an image cannot be served.

use std::ffi::{CString, c_int};
use std::io;

use super::name::ImageName;

/// Why an image cannot be served. Each names it and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    /// There is no Ceph on this machine.
    #[error("{0}")]
    Library(&'static str),
    /// A step failed.
    #[error("{image}: cannot {what}: {source}{hint}")]
    Step {
        /// The image as it was given.
        image: String,
        /// The step.
        what: &'static str,
        /// What the library said.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// The image has no exclusive-lock feature, so nothing keeps another writer out.
    #[error(
        "rbd:{0}: the image cannot be locked, so that two servers could write to it: enable that (rbd feature enable {0} \
         exclusive-lock), or serve it with read-only"
    )]
    NoLock(String),
    /// Another client has it.
    #[error(
        "rbd:{image} is in use by client {owner} of the cluster (rbd status, rbd lock ls): stop that one first; if it has \
         died, the image is free half a minute after that"
    )]
    InUse {
        /// The image as it was given.
        image: String,
        /// The client's name.
        owner: String,
    },
    /// Its metadata, or those of its pool, break a promise of the disk.
    #[error(
        "rbd:{image}: the {place} sets {option} to '{value}', with which writes that have ended could be lost or land after a \
         successor's: remove that (rbd config {place} remove)"
    )]
    Overridden {
        /// The image as it was given.
        image: String,
        /// `image` or `pool`.
        place: &'static str,
        /// The option.
        option: String,
        /// Its value there.
        value: String,
    },
    /// A size that no disk can have.
    #[error(
        "rbd:{image} has {size_bytes} bytes, which is not the size of a disk: resize it (rbd resize)"
    )]
    Size {
        /// The image as it was given.
        image: String,
        /// Its size.
        size_bytes: u64,
    },
    /// A text that C cannot have.
    #[error("{0:?}: there is a NUL in it")]
    Nul(String),
}

/// The error that a function of the libraries returned as a negative number.
pub(super) fn system_error(result: c_int) -> io::Error {
    io::Error::from_raw_os_error(-result)
}

/// Whether a step succeeded, by what a function of the libraries returned.
pub(super) fn step(
    image: &ImageName,
    what: &'static str,
    result: c_int,
    hint: &'static str,
) -> Result<(), RbdError> {
    if result >= 0 {
        return Ok(());
    }
    Err(RbdError::Step {
        image: format!("rbd:{image}"),
        what,
        source: system_error(result),
        hint,
    })
}

/// A text for a C function.
pub(super) fn text(text: &str) -> Result<CString, RbdError> {
    CString::new(text).map_err(|_| RbdError::Nul(text.to_owned()))
}
