//! Learning that another client has changed an image that is only read: the library itself does not watch one.

use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::null;
use std::sync::atomic::{AtomicBool, Ordering};

use super::library::{Functions, Pool, Rados};
use crate::engine::Changed;

/// What clients of an image tell each other when it has changed (`NOTIFY_OP_HEADER_UPDATE`), after the six bytes of a
/// version. Other messages are about its lock.
const HEADER_UPDATE: u32 = 3;
const MESSAGE_BEGINS_AT: usize = 6;

/// What the library calls back with.
struct Told {
    functions: &'static Functions,
    pool: Pool,
    header: CString,
    tell: Changed,
    is_lost: AtomicBool,
}

/// A registration for the messages of an image's clients, which come on threads of the library. The clients wait for an
/// answer.
pub(super) struct HeaderWatch {
    functions: &'static Functions,
    rados: Rados,
    cookie: Option<u64>,
    told: Box<Told>,
}

// SAFETY: the handles of the library may be used by any thread at any time.
unsafe impl Send for HeaderWatch {}

impl HeaderWatch {
    /// Has `tell` called whenever the image has changed, or may have. It must not wait, nor call the library.
    ///
    /// # Errors
    ///
    /// The library's errno: the user needs the right to write to the pool.
    ///
    /// # Safety
    ///
    /// Client and pool must stay open as long as the value.
    pub(super) unsafe fn new(
        functions: &'static Functions,
        (rados, pool): (Rados, Pool),
        header: CString,
        tell: Changed,
    ) -> Result<Self, c_int> {
        let mut this = Self {
            functions,
            rados,
            cookie: None,
            told: Box::new(Told {
                functions,
                pool,
                header,
                tell,
                is_lost: AtomicBool::new(true),
            }),
        };
        this.renew()?;
        Ok(this)
    }

    /// Registers anew if the connection was lost, and with it perhaps a message.
    ///
    /// # Errors
    ///
    /// The library's errno. Nothing is called any more.
    pub(super) fn renew(&mut self) -> Result<(), c_int> {
        if !self.told.is_lost.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        self.end();
        let (told, mut cookie) = (&raw const *self.told, 0);
        // SAFETY: the pool is open, the text ends with a NUL. `told` stays where it is until no more calls can come.
        let result = unsafe {
            (self.functions.rados_watch3)(
                self.told.pool,
                self.told.header.as_ptr(),
                &raw mut cookie,
                notified,
                lost,
                0,
                told.cast_mut().cast(),
            )
        };
        if result < 0 {
            return Err(result);
        }
        self.cookie = Some(cookie);
        Ok(())
    }

    /// When this returns no callback runs, and none comes.
    fn end(&mut self) {
        if let Some(cookie) = self.cookie.take() {
            // SAFETY: client and pool are open, and the registration is there.
            unsafe {
                (self.functions.rados_unwatch2)(self.told.pool, cookie);
                (self.functions.rados_watch_flush)(self.rados);
            }
        }
    }
}

impl Drop for HeaderWatch {
    fn drop(&mut self) {
        self.end();
    }
}

extern "C" fn notified(
    told: *mut c_void,
    message: u64,
    cookie: u64,
    _client: u64,
    data: *mut c_void,
    len: usize,
) {
    // SAFETY: it is freed after the registration has ended.
    let told = unsafe { &*told.cast::<Told>() };
    let data = match data.is_null() {
        true => &[],
        // SAFETY: the library has so many bytes there until this returns.
        false => unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) },
    };
    // SAFETY: the pool is open, the text ends with a NUL, and the answer is empty.
    unsafe {
        (told.functions.rados_notify_ack)(
            told.pool,
            told.header.as_ptr(),
            message,
            cookie,
            null::<c_char>(),
            0,
        );
    }
    let what = data.get(MESSAGE_BEGINS_AT..).and_then(<[u8]>::first_chunk);
    if what.is_none_or(|what| u32::from_le_bytes(*what) == HEADER_UPDATE) {
        (told.tell)();
    }
}

/// The connection was lost, and messages with it.
extern "C" fn lost(told: *mut c_void, _cookie: u64, _error: c_int) {
    // SAFETY: as above.
    let told = unsafe { &*told.cast::<Told>() };
    told.is_lost.store(true, Ordering::Relaxed);
    (told.tell)();
}
