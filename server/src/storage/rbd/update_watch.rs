//! Learning that another client has changed the image.

use std::ffi::{c_int, c_void};

use super::library::{Functions, Image};
use crate::engine::Changed;

/// A registration with the library, which calls from a thread of its own.
pub(super) struct UpdateWatch {
    functions: &'static Functions,
    image: Image,
    handle: u64,
    tell: *mut Changed,
}

// SAFETY: `tell` may be called by any thread; the value is used by the thread that drops it.
unsafe impl Send for UpdateWatch {}

impl UpdateWatch {
    /// Has `tell` called whenever the image has changed. It must not wait, nor call the library.
    ///
    /// # Errors
    ///
    /// The library's errno.
    ///
    /// # Safety
    ///
    /// The image must stay open as long as the value.
    pub(super) unsafe fn new(
        functions: &'static Functions,
        image: Image,
        tell: Changed,
    ) -> Result<Self, c_int> {
        let tell = Box::into_raw(Box::new(tell));
        let mut handle = 0;
        // SAFETY: the image is open. `tell` is freed when no more calls can come.
        let result =
            unsafe { (functions.rbd_update_watch)(image, &raw mut handle, changed, tell.cast()) };
        if result < 0 {
            // SAFETY: it was made above, and the library does not have it.
            drop(unsafe { Box::from_raw(tell) });
            return Err(result);
        }
        Ok(Self {
            functions,
            image,
            handle,
            tell,
        })
    }
}

impl Drop for UpdateWatch {
    fn drop(&mut self) {
        // SAFETY: the image is open. The call waits for a callback that runs.
        let result = unsafe { (self.functions.rbd_update_unwatch)(self.image, self.handle) };
        if result == 0 {
            // SAFETY: it was made in `new`, and no more calls come.
            drop(unsafe { Box::from_raw(self.tell) });
        }
    }
}

extern "C" fn changed(tell: *mut c_void) {
    // SAFETY: it is freed after the registration has ended.
    let tell = unsafe { &*tell.cast::<Changed>() };
    tell();
}
