//! Access points: places just before shared memory is accessed, where a fuzz target changes that memory, or copies
//! it, between any two accesses of the server.
//!
//! They work in builds with the feature `testing`. In all others a point is an empty function.

#[cfg(feature = "testing")]
pub use armed::at_each_access;

/// Runs what this thread asked to be run before each access.
#[inline(always)]
pub(super) fn point() {
    #[cfg(feature = "testing")]
    armed::reach();
}

#[cfg(feature = "testing")]
mod armed {
    use std::cell::RefCell;

    /// What runs before each access.
    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// From now on `hook` runs before each access of this thread to shared memory, or nothing does. It must not use
    /// the door itself.
    pub fn at_each_access(hook: Option<Hook>) {
        HOOK.set(hook);
    }

    pub(super) fn reach() {
        HOOK.with_borrow_mut(|hook| {
            if let Some(hook) = hook {
                hook();
            }
        });
    }
}
