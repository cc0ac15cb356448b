//! librados and librbd, loaded when the first image is opened: without one, neither needs to be installed.
//!
//! The declarations are those of `rados/librados.h` and `rbd/librbd.h`; both libraries have kept their names and these
//! functions since Ceph 16. A test in `tests/rbd.rs` has a C compiler compare them with the headers.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// `rados_t`: a client of a cluster.
pub(super) type Rados = *mut c_void;
/// `rados_ioctx_t`: a pool of it.
pub(super) type Pool = *mut c_void;
/// `rbd_image_t`.
pub(super) type Image = *mut c_void;
/// `rbd_completion_t`.
pub(super) type Completion = *mut c_void;

/// `rbd_callback_t`.
pub(super) type Callback = extern "C" fn(Completion, *mut c_void);

/// `rbd_image_watcher_t`: a client that has the image open, and is alive.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Watcher {
    /// The client's name, the same as that of an owner of the lock.
    pub(super) address: *mut c_char,
    pub(super) id: i64,
    pub(super) cookie: u64,
}

/// `rbd_update_callback_t`.
pub(super) type UpdateCallback = extern "C" fn(*mut c_void);

/// `rados_watchcb2_t`.
pub(super) type WatchCallback = extern "C" fn(*mut c_void, u64, u64, u64, *mut c_void, usize);

/// `rados_watcherrcb_t`.
pub(super) type LostCallback = extern "C" fn(*mut c_void, u64, c_int);

/// `librbd_progress_fn_t`.
pub(super) type Progress = Option<extern "C" fn(u64, u64, *mut c_void) -> c_int>;

/// `RBD_LOCK_MODE_EXCLUSIVE`.
pub(super) const EXCLUSIVE: c_int = 0;

/// `RBD_WRITE_ZEROES_FLAG_THICK_PROVISION`: the space is allocated.
pub(super) const THICK: c_int = 1;

/// `RBD_FEATURE_EXCLUSIVE_LOCK`.
pub(super) const FEATURE_EXCLUSIVE_LOCK: u64 = 1 << 2;

macro_rules! functions {
    ($($library:literal { $($name:ident($($argument:ty),*) $(-> $result:ty)?;)* })*) => {
        /// The functions that are used, by their names.
        pub(super) struct Functions {
            $($(pub(super) $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*)*
        }

        impl Functions {
            fn load() -> Result<Self, String> {
                $($(let $name;)*)*
                $({
                    let library = open($library)?;
                    $(
                        // SAFETY: the type is that of the header.
                        $name = unsafe { *find(&library, $library, concat!(stringify!($name), "\0"))? };
                    )*
                    // For as long as the process lives: threads of the library run to its end.
                    std::mem::forget(library);
                })*
                Ok(Self { $($($name,)*)* })
            }
        }
    };
}

functions! {
    "librados.so.2" {
        rados_create2(*mut Rados, *const c_char, *const c_char, u64) -> c_int;
        rados_conf_read_file(Rados, *const c_char) -> c_int;
        rados_conf_get(Rados, *const c_char, *mut c_char, usize) -> c_int;
        rados_conf_set(Rados, *const c_char, *const c_char) -> c_int;
        rados_connect(Rados) -> c_int;
        rados_shutdown(Rados);
        rados_cluster_fsid(Rados, *mut c_char, usize) -> c_int;
        rados_mon_command(Rados, *mut *const c_char, usize, *const c_char, usize, *mut *mut c_char, *mut usize, *mut *mut c_char, *mut usize) -> c_int;
        rados_ioctx_create(Rados, *const c_char, *mut Pool) -> c_int;
        rados_ioctx_set_namespace(Pool, *const c_char);
        rados_ioctx_get_id(Pool) -> i64;
        rados_ioctx_destroy(Pool);
        rados_watch3(Pool, *const c_char, *mut u64, WatchCallback, LostCallback, u32, *mut c_void) -> c_int;
        rados_unwatch2(Pool, u64) -> c_int;
        rados_watch_flush(Rados) -> c_int;
        rados_notify_ack(Pool, *const c_char, u64, u64, *const c_char, c_int) -> c_int;
    }
    "librbd.so.1" {
        rbd_open(Pool, *const c_char, *mut Image, *const c_char) -> c_int;
        rbd_open_read_only(Pool, *const c_char, *mut Image, *const c_char) -> c_int;
        rbd_open_by_id_read_only(Pool, *const c_char, *mut Image, *const c_char) -> c_int;
        rbd_close(Image) -> c_int;
        rbd_get_size(Image, *mut u64) -> c_int;
        rbd_get_features(Image, *mut u64) -> c_int;
        rbd_get_stripe_unit(Image, *mut u64) -> c_int;
        rbd_get_id(Image, *mut c_char, usize) -> c_int;
        rbd_metadata_set(Image, *const c_char, *const c_char) -> c_int;
        rbd_metadata_get(Image, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_pool_metadata_get(Pool, *const c_char, *mut c_char, *mut usize) -> c_int;
        rbd_resize2(Image, u64, bool, Progress, *mut c_void) -> c_int;
        rbd_update_watch(Image, *mut u64, UpdateCallback, *mut c_void) -> c_int;
        rbd_update_unwatch(Image, u64) -> c_int;
        rbd_flush(Image) -> c_int;
        rbd_lock_acquire(Image, c_int) -> c_int;
        rbd_lock_release(Image) -> c_int;
        rbd_is_exclusive_lock_owner(Image, *mut c_int) -> c_int;
        rbd_lock_get_owners(Image, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
        rbd_lock_get_owners_cleanup(*mut *mut c_char, usize);
        rbd_watchers_list(Image, *mut Watcher, *mut usize) -> c_int;
        rbd_watchers_list_cleanup(*mut Watcher, usize);
        rbd_lock_break(Image, c_int, *const c_char) -> c_int;
        rbd_aio_create_completion(*mut c_void, Callback, *mut Completion) -> c_int;
        rbd_aio_get_return_value(Completion) -> isize;
        rbd_aio_release(Completion);
        rbd_aio_read(Image, u64, usize, *mut c_char, Completion) -> c_int;
        rbd_aio_write(Image, u64, usize, *const c_char, Completion) -> c_int;
        rbd_aio_discard(Image, u64, u64, Completion) -> c_int;
        rbd_aio_write_zeroes(Image, u64, usize, Completion, c_int, c_int) -> c_int;
        rbd_aio_flush(Image, Completion) -> c_int;
    }
}

/// The functions, or why there are none.
pub(super) fn functions() -> Result<&'static Functions, &'static str> {
    static LOADED: OnceLock<Result<Functions, String>> = OnceLock::new();
    match LOADED.get_or_init(Functions::load) {
        Ok(functions) => Ok(functions),
        Err(why) => Err(why),
    }
}

fn open(name: &str) -> Result<Library, String> {
    // SAFETY: initializers of the system's own libraries, which set up these libraries and nothing else. librbd finds
    // plugins that want its symbols: they are global.
    let opened = unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) };
    opened.map_err(|error| {
        let error = cause(&error);
        format!("rbd: needs Ceph's client library: {error}; install it (Debian: librbd1, Fedora: librbd1)")
    })
}

/// # Safety
///
/// The symbol must be of type `T`.
unsafe fn find<T: Copy>(
    library: &Library,
    library_name: &str,
    name: &'static str,
) -> Result<libloading::os::unix::Symbol<T>, String> {
    // SAFETY: as the caller says.
    unsafe { library.get(name.as_bytes()) }.map_err(|error| {
        let error = cause(&error);
        format!("{library_name} is older than Ceph 16, or broken: {error}; install a newer one")
    })
}

/// What the dynamic linker said, which names the library.
fn cause(error: &libloading::Error) -> String {
    error
        .source()
        .map_or_else(|| error.to_string(), ToString::to_string)
}

/// The text in an array that a C function has filled.
pub(super) fn read_text(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> = bytes.iter().map(|byte| byte.cast_unsigned()).collect();
    let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    text.to_string_lossy().into_owned()
}
