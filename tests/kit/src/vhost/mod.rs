//! A vhost-user-blk front-end: guest memory, split rings and messages, each as correct or as wrong as a
//! test wants it. Its methods panic when the device refuses; see [`attempt`].

mod driver;
mod memory;
pub mod raw;
mod vring;

pub use driver::Driver;
pub use memory::{Memory, Raw};
pub use vring::{Vring, readable};

/// Features (virtio 1.3, 5.2.3 and 6).
#[allow(missing_docs, reason = "the names of the specification")]
mod features {
    pub const VERSION_1: u64 = 1 << 32;
    pub const PROTOCOL: u64 = 1 << 30;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const INDIRECT: u64 = 1 << 28;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const DISCARD: u64 = 1 << 13;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const FLUSH: u64 = 1 << 9;
}
pub use features::*;

/// What an ordinary driver accepts.
pub const USUAL: u64 =
    VERSION_1 | INDIRECT | PROTOCOL | FLUSH | CONFIG_WCE | DISCARD | WRITE_ZEROES;

/// Descriptor flags, request types and status bytes (virtio 1.3, 2.7.5 and 5.2.6).
#[allow(missing_docs, reason = "the names of the specification")]
mod requests {
    pub const NEXT: u16 = 1;
    pub const WRITE: u16 = 2;
    pub const TABLE: u16 = 4;

    pub const T_IN: u32 = 0;
    pub const T_OUT: u32 = 1;
    pub const T_FLUSH: u32 = 4;
    pub const T_GET_ID: u32 = 8;
    pub const T_DISCARD: u32 = 11;
    pub const T_WRITE_ZEROES: u32 = 13;

    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
}
pub use requests::*;

/// What a status byte holds before the device writes it.
pub const UNTOUCHED: u8 = 0xaa;

/// Bytes of a driver's guest memory.
pub const MEMORY_BYTES: u64 = 4 << 20;

/// Where a driver claims to have its memory mapped.
pub const USER_BASE: u64 = 0x7000_0000_0000;

/// Where test data may be put: rings are below.
pub const DATA: u64 = 1 << 20;

/// Runs steps of a driver that the device may refuse; the panic's message if it did.
///
/// # Errors
/// The device refused.
pub fn attempt<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    let what = std::panic::AssertUnwindSafe(what);
    std::panic::catch_unwind(what).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(_) => "the device refused".to_owned(),
    })
}
