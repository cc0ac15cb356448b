//! The C interface, described in `include/upgrade_proto.h`. Results are descriptors or negative errno
//! values; a panic aborts (`extern "C"`).

use std::cell::RefCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_uint};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::{
    Answer, BlockUpgrade, Error, Key, Listener, Lookup, Name, NoService, Options, Route, connect,
    printable,
};

const ROUTE_KERNEL: c_uint = 1;
const ROUTE_REGISTRY: c_uint = 2;

fn code(route: Route) -> c_uint {
    match route {
        Route::Kernel => ROUTE_KERNEL,
        Route::Registry => ROUTE_REGISTRY,
    }
}

/// Why a call failed: the errno value and the text.
struct Failure(Errno, String);

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self(error.errno(), error.to_string())
    }
}

impl From<NoService> for Failure {
    fn from(why: NoService) -> Self {
        Self(why.errno(), why.to_string())
    }
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self(errno, errno.to_string())
    }
}

/// The caller broke a rule of the header.
fn misuse(why: &str) -> Failure {
    Failure(Errno::INVAL, why.to_owned())
}

thread_local! {
    /// The text of the last failure of this thread.
    static LAST_ERROR: RefCell<CString> = RefCell::default();
}

/// A result as a C return value.
fn answer(result: Result<c_int, Failure>) -> c_int {
    result.unwrap_or_else(|Failure(errno, text)| {
        // Without control characters there is no NUL in it.
        let text = CString::new(printable(&text)).unwrap_or_default();
        LAST_ERROR.set(text);
        -errno.raw_os_error()
    })
}

/// The version of the library; see the header.
#[unsafe(no_mangle)]
pub extern "C" fn upgrade_version() -> *const c_char {
    const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "\0");
    VERSION.as_ptr().cast()
}

/// The text of the last failure; see the header.
#[unsafe(no_mangle)]
pub extern "C" fn upgrade_error() -> *const c_char {
    // The text stays where it is until the next failure replaces it.
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// # Safety
/// `text` is NULL or a string that lives, unchanged, as long as the result.
unsafe fn text<'a>(text: *const c_char) -> Option<&'a CStr> {
    // SAFETY: not NULL, so a string by the caller's promise.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
}

/// # Safety
/// As for [`text`].
unsafe fn name(name: *const c_char) -> Result<Name, Failure> {
    // SAFETY: passed on.
    let name = unsafe { text(name) }.ok_or_else(|| misuse("the name of the service is NULL"))?;
    Ok(Name::new(&name.to_string_lossy())?)
}

/// # Safety
/// As for [`text`].
unsafe fn path<'a>(path: *const c_char) -> Option<&'a Path> {
    // SAFETY: passed on.
    unsafe { text(path) }.map(|path| Path::new(OsStr::from_bytes(path.to_bytes())))
}

/// # Safety
/// `fd` is not closed before the result is gone.
unsafe fn descriptor<'a>(fd: c_int) -> Result<BorrowedFd<'a>, Failure> {
    if fd < 0 {
        return Err(Errno::BADF.into());
    }
    // SAFETY: not -1, and open by the caller's promise; if it is not, system calls answer EBADF.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// # Safety
/// `out` is NULL or valid for one write.
unsafe fn put<T>(out: *mut T, value: T) {
    if !out.is_null() {
        // SAFETY: not NULL, so valid by the caller's promise; what was there is plain data.
        unsafe { out.write(value) };
    }
}

/// # Safety
/// As for [`text`].
unsafe fn lookup(runtime_dir: *const c_char) -> Lookup {
    // SAFETY: passed on.
    let dir = unsafe { path(runtime_dir) }.map(PathBuf::from);
    dir.map_or_else(Lookup::default, |dir| Lookup {
        runtime_dirs: vec![dir],
        ..Lookup::default()
    })
}

/// Offers a service; see the header.
///
/// # Safety
/// Strings are NULL or NUL-terminated, `disk` is NULL or two integers, `routes` NULL or writable, `out` writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_listen(
    fd: c_int,
    service: *const c_char,
    runtime_dir: *const c_char,
    disk: *const c_uint,
    out: *mut *mut Listener,
    routes: *mut c_uint,
) -> c_int {
    let bind = || {
        if out.is_null() {
            return Err(misuse("the pointer for the result is NULL"));
        }
        // SAFETY: by the caller's promise; all are used during this call only.
        let (fd, name, dir) = unsafe { (descriptor(fd)?, name(service)?, path(runtime_dir)) };
        let mut options = Options::default();
        if let Some(dir) = dir {
            options.runtime_dir = Some(dir.to_owned());
        }
        if !disk.is_null() {
            // SAFETY: two integers by the caller's promise.
            let [major, minor] = unsafe { disk.cast::<[c_uint; 2]>().read() };
            options.key = Some(Key::of_disk(major, minor)?);
        }
        let listener = Listener::bind(fd, &name, &options)?;
        let open = listener
            .routes()
            .into_iter()
            .fold(0, |open, route| open | code(route));
        let poll = listener.as_fd().as_raw_fd();
        // SAFETY: checked or promised; the box is the caller's until upgrade_listener_free.
        unsafe {
            put(routes, open);
            put(out, Box::into_raw(Box::new(listener)));
        }
        Ok(poll)
    };
    answer(bind())
}

/// Takes a waiting connection; see the header.
///
/// # Safety
/// `listener` comes from `upgrade_listen` and was not freed; `route` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_accept(listener: *const Listener, route: *mut c_uint) -> c_int {
    // SAFETY: NULL or alive by the caller's promise.
    let Some(listener) = (unsafe { listener.as_ref() }) else {
        return answer(Err(misuse("the listener is NULL")));
    };
    answer(match listener.accept() {
        Ok(Some(connection)) => {
            // SAFETY: by the caller's promise.
            unsafe { put(route, code(connection.route())) };
            Ok(connection.into_stream().into_raw_fd())
        }
        Ok(None) => Err(Errno::AGAIN.into()),
        Err(error) => Err(error.into()),
    })
}

/// Ends an offer; see the header.
///
/// # Safety
/// `listener` is NULL, or comes from `upgrade_listen` and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_listener_free(listener: *mut Listener) {
    if !listener.is_null() {
        // SAFETY: made by Box::into_raw in upgrade_listen, and given back once.
        drop(unsafe { Box::from_raw(listener) });
    }
}

/// Connects to a service; see the header.
///
/// # Safety
/// Strings are NULL or NUL-terminated, `route` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_connect(
    fd: c_int,
    service: *const c_char,
    runtime_dir: *const c_char,
    route: *mut c_uint,
) -> c_int {
    let find = || {
        // SAFETY: by the caller's promise; all are used during this call only.
        let (fd, name, lookup) = unsafe { (descriptor(fd)?, name(service)?, lookup(runtime_dir)) };
        match connect(fd, &name, &lookup)? {
            Answer::Found(connection) => {
                // SAFETY: by the caller's promise.
                unsafe { put(route, code(connection.route())) };
                Ok(connection.into_stream().into_raw_fd())
            }
            Answer::NoService(why) => Err(why.into()),
        }
    };
    answer(find())
}

/// Claims and upgrades a block device; see the header.
///
/// # Safety
/// Strings are NULL or NUL-terminated, `route` is NULL or writable, `out` writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_block(
    fd: c_int,
    service: *const c_char,
    runtime_dir: *const c_char,
    out: *mut *mut BlockUpgrade,
    route: *mut c_uint,
) -> c_int {
    let upgrade = || {
        if out.is_null() {
            return Err(misuse("the pointer for the result is NULL"));
        }
        // SAFETY: by the caller's promise; all are used during this call only.
        let (fd, name, lookup) = unsafe { (descriptor(fd)?, name(service)?, lookup(runtime_dir)) };
        match BlockUpgrade::from_fd(fd, &name, &lookup)? {
            Answer::Found(upgrade) => {
                let connection = upgrade.connection();
                let (socket, route_taken) =
                    (connection.as_fd().as_raw_fd(), code(connection.route()));
                // SAFETY: checked or promised; the box is the caller's until upgrade_block_release.
                unsafe {
                    put(route, route_taken);
                    put(out, Box::into_raw(Box::new(upgrade)));
                }
                Ok(socket)
            }
            Answer::NoService(why) => Err(why.into()),
        }
    };
    answer(upgrade())
}

/// Ends an upgrade; see the header.
///
/// # Safety
/// `upgrade` is NULL, or comes from `upgrade_block` and was not released.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn upgrade_block_release(upgrade: *mut BlockUpgrade) -> c_int {
    if upgrade.is_null() {
        return answer(Err(misuse("the upgrade is NULL")));
    }
    // SAFETY: made by Box::into_raw in upgrade_block, and given back once.
    let upgrade = unsafe { Box::from_raw(upgrade) };
    answer(upgrade.release().map(|()| 0).map_err(Failure::from))
}
