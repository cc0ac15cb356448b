//! An open image, and the client of the cluster that has it open.

use std::ffi::{CStr, CString, c_int, c_void};
use std::io;
use std::mem::ManuallyDrop;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use super::cluster::{CAPS, Cluster, OWN_OPTIONS};
use super::error::{RbdError, step, system_error, text};
use super::header_watch::HeaderWatch;
use super::library::{
    self, EXCLUSIVE, FEATURE_EXCLUSIVE_LOCK, Functions, Pool, Watcher, read_text,
};
use super::name::ImageName;
use super::update_watch::UpdateWatch;
use crate::engine::Changed;

/// The image's metadatum that names the client of the last server that had its lock.
const WRITER: &CStr = c"ublkup_writer";

/// How long opening may take before the log says what it waits for.
const PATIENCE: Duration = Duration::from_secs(5);

/// The open image. Closing it waits for the cluster.
pub(super) struct OpenImage {
    pub(super) functions: &'static Functions,
    name: ImageName,
    /// Ends after the image and the pool.
    cluster: ManuallyDrop<Cluster>,
    pool: Pool,
    image: AtomicPtr<c_void>,
    /// Those that were replaced by `image`. Requests may be under way with them.
    older: Mutex<Vec<library::Image>>,
    read_only: bool,
    /// Dropped before the image is closed, as the next.
    update_watch: Mutex<Option<UpdateWatch>>,
    /// In its place where the image is only read.
    header_watch: Mutex<Option<HeaderWatch>>,
    abandoned: AtomicBool,
}

// SAFETY: all functions that are called with these handles may be called by any thread at any time.
unsafe impl Send for OpenImage {}
// SAFETY: as above.
unsafe impl Sync for OpenImage {}

impl std::fmt::Debug for OpenImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.name)
    }
}

impl OpenImage {
    /// Connects to the cluster and opens the image. Does not lock it.
    pub(super) fn open(name: &ImageName, read_only: bool) -> Result<Self, RbdError> {
        reminded(name, || Self::connect_and_open(name, read_only))
    }

    fn connect_and_open(name: &ImageName, read_only: bool) -> Result<Self, RbdError> {
        let functions = library::functions().map_err(RbdError::Library)?;
        end_without_destructors();
        // From here on dropping it undoes what has been done.
        let mut this = Self {
            functions,
            name: name.clone(),
            cluster: ManuallyDrop::new(Cluster::connect(functions, name)?),
            pool: null_mut(),
            image: AtomicPtr::default(),
            older: Mutex::default(),
            read_only,
            update_watch: Mutex::default(),
            header_watch: Mutex::default(),
            abandoned: AtomicBool::new(false),
        };
        let pool = text(&name.pool)?;
        // SAFETY: the client is connected, and the text ends with a NUL.
        let result = unsafe {
            (functions.rados_ioctx_create)(this.cluster.handle(), pool.as_ptr(), &raw mut this.pool)
        };
        let hint = "; ceph osd lspools shows which there are";
        this.step("open the pool", result, hint)?;
        let namespace = text(&name.namespace)?;
        // SAFETY: as above.
        unsafe { (functions.rados_ioctx_set_namespace)(this.pool, namespace.as_ptr()) };
        let image = text(&name.image)?;
        let snapshot = name.snapshot.as_deref().map(text).transpose()?;
        let snapshot = snapshot.as_ref().map_or(null(), |text| text.as_ptr());
        let open = match read_only {
            true => functions.rbd_open_read_only,
            false => functions.rbd_open,
        };
        // SAFETY: as above; a snapshot is a text or null.
        let result = unsafe { open(this.pool, image.as_ptr(), this.image.get_mut(), snapshot) };
        let hint = match -result {
            libc::ENOENT if name.snapshot.is_some() => "; rbd snap ls shows its snapshots",
            libc::ENOENT => "; rbd ls shows which there are",
            libc::EPERM | libc::EACCES => CAPS,
            _ => "",
        };
        this.step("open the image", result, hint)?;
        if !read_only {
            this.check_options()?;
        }
        Ok(this)
    }

    /// Makes sure that neither the image nor its pool sets one of [`OWN_OPTIONS`] to something else: what is there has
    /// precedence over what a client sets.
    fn check_options(&self) -> Result<(), RbdError> {
        for (option, own) in OWN_OPTIONS {
            let (option, own) = (option.to_string_lossy(), own.to_string_lossy());
            let key = text(&format!("conf_{option}"))?;
            for place in ["image", "pool"] {
                let (mut value, mut len) = ([0; 256], 256);
                // SAFETY: the image is open and the pool, the text ends with a NUL, the array is as long as is said.
                let result = unsafe {
                    match place {
                        "image" => (self.functions.rbd_metadata_get)(
                            self.handle(),
                            key.as_ptr(),
                            value.as_mut_ptr(),
                            &raw mut len,
                        ),
                        _ => (self.functions.rbd_pool_metadata_get)(
                            self.pool,
                            key.as_ptr(),
                            value.as_mut_ptr(),
                            &raw mut len,
                        ),
                    }
                };
                // -ENOENT: it is not set there. One that does not fit is another one.
                let other = (result == 0).then(|| read_text(&value));
                let too_long = -result == libc::ERANGE;
                if too_long || other.as_ref().is_some_and(|other| *other != own) {
                    return Err(RbdError::Overridden {
                        image: self.name.to_string(),
                        place,
                        option: option.into_owned(),
                        value: other.unwrap_or_default(),
                    });
                }
            }
        }
        Ok(())
    }

    /// The handle for requests.
    pub(super) fn handle(&self) -> library::Image {
        self.image.load(Ordering::Relaxed)
    }

    /// The client that has it open.
    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The image's name.
    pub(super) fn name(&self) -> &ImageName {
        &self.name
    }

    /// Its size in bytes.
    pub(super) fn size_bytes(&self) -> Result<u64, RbdError> {
        self.number("read the size of the image", self.functions.rbd_get_size)
    }

    /// Its size in bytes, also if another client has changed it. The library does not look at an image that is only read
    /// again: it is opened anew, and what is had open already is kept for requests that are under way.
    pub(super) fn size_bytes_now(&self) -> Result<u64, RbdError> {
        let was_bytes = self.size_bytes()?;
        if !self.read_only || self.name.snapshot.is_some() {
            return Ok(was_bytes);
        }
        if let Some(watch) = &mut *locked(&self.header_watch) {
            self.warn_unwatched(watch.renew());
        }
        let id = text(&self.id()?)?;
        let mut image = null_mut();
        let open = self.functions.rbd_open_by_id_read_only;
        // SAFETY: the pool is open, the text ends with a NUL, and the handle is written.
        let result = unsafe { open(self.pool, id.as_ptr(), &raw mut image, null()) };
        self.step("open the image again", result, "")?;
        let mut now_bytes = 0;
        // SAFETY: the image is open, and the number is written.
        let result = unsafe { (self.functions.rbd_get_size)(image, &raw mut now_bytes) };
        if result >= 0 && now_bytes > was_bytes {
            let before = self.image.swap(image, Ordering::Relaxed);
            locked(&self.older).push(before);
        } else {
            // SAFETY: it was opened above, and no request was made with it.
            unsafe { (self.functions.rbd_close)(image) };
        }
        self.step("read the size of the image", result, "")?;
        Ok(now_bytes)
    }

    /// The size of its objects, or of the stripes in them.
    pub(super) fn stripe_bytes(&self) -> Result<u64, RbdError> {
        self.number(
            "read the image's layout",
            self.functions.rbd_get_stripe_unit,
        )
    }

    /// Whether it has the feature that keeps other writers out.
    pub(super) fn can_be_locked(&self) -> Result<bool, RbdError> {
        let features = self.number("read the image's features", self.functions.rbd_get_features)?;
        Ok(features & FEATURE_EXCLUSIVE_LOCK != 0)
    }

    fn number(
        &self,
        what: &'static str,
        get: unsafe extern "C" fn(library::Image, *mut u64) -> c_int,
    ) -> Result<u64, RbdError> {
        let mut number = 0;
        // SAFETY: the image is open, and the number is written.
        let result = unsafe { get(self.handle(), &raw mut number) };
        self.step(what, result, "")?;
        Ok(number)
    }

    /// What identifies it: cluster, pool and number of the image, which do not change when it is renamed.
    pub(super) fn identity(&self) -> Option<String> {
        // SAFETY: the pool is open.
        let pool = unsafe { (self.functions.rados_ioctx_get_id)(self.pool) };
        let snapshot = self.name.snapshot.as_deref().unwrap_or_default();
        let (cluster, id) = (self.cluster.id(), self.id().ok()?);
        Some(format!("rbd:{cluster}:{pool}:{id}@{snapshot}"))
    }

    /// Its number in the pool.
    fn id(&self) -> Result<String, RbdError> {
        let mut id = [0; 64];
        // SAFETY: the image is open, the array as long as is said.
        let result =
            unsafe { (self.functions.rbd_get_id)(self.handle(), id.as_mut_ptr(), id.len()) };
        self.step("read the number of the image", result, "")?;
        Ok(read_text(&id))
    }

    /// The client that has it locked.
    pub(super) fn lock_owner(&self) -> Result<Option<String>, RbdError> {
        let (mut mode, mut owners, mut count) = (0, [null_mut(); 8], 8);
        // SAFETY: the image is open, the array has as many places as is said.
        let result = unsafe {
            (self.functions.rbd_lock_get_owners)(
                self.handle(),
                &raw mut mode,
                owners.as_mut_ptr(),
                &raw mut count,
            )
        };
        if -result == libc::ENOENT {
            return Ok(None);
        }
        self.step("see who has the image locked", result, "")?;
        // SAFETY: the library has filled in so many texts.
        let first = (count > 0).then(|| unsafe { CStr::from_ptr(owners[0]) });
        let owner = first.map(|text| text.to_string_lossy().into_owned());
        // SAFETY: they are the library's, and not used after this.
        unsafe { (self.functions.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count) };
        Ok(owner)
    }

    /// Whether this client has it locked, as far as it knows.
    pub(super) fn is_lock_owner(&self) -> Result<bool, RbdError> {
        let mut is_owner = 0;
        // SAFETY: the image is open, and the number is written.
        let result = unsafe {
            (self.functions.rbd_is_exclusive_lock_owner)(self.handle(), &raw mut is_owner)
        };
        self.step("see whether the image is locked", result, "")?;
        Ok(is_owner != 0)
    }

    /// Whether a client is connected to the image. The cluster forgets one that has died, or cannot reach it, after 30
    /// seconds (`osd_client_watch_timeout`).
    pub(super) fn is_watched_by(&self, client: &str) -> Result<bool, RbdError> {
        let none = Watcher {
            address: null_mut(),
            id: 0,
            cookie: 0,
        };
        let mut room = 16;
        let (watchers, count) = loop {
            let (mut watchers, mut count) = (vec![none; room], room);
            // SAFETY: the image is open, the array has as many places as is said.
            let result = unsafe {
                (self.functions.rbd_watchers_list)(
                    self.handle(),
                    watchers.as_mut_ptr(),
                    &raw mut count,
                )
            };
            if -result != libc::ERANGE {
                self.step("see which clients have the image open", result, "")?;
                break (watchers, count);
            }
            room = count.max(2 * room);
        };
        let mut watchers = watchers;
        let is_there = watchers[..count].iter().any(|watcher| {
            // SAFETY: the library has filled in so many texts.
            let address = unsafe { CStr::from_ptr(watcher.address) };
            address.to_bytes() == client.as_bytes()
        });
        // SAFETY: they are the library's, and not used after this.
        unsafe { (self.functions.rbd_watchers_list_cleanup)(watchers.as_mut_ptr(), count) };
        Ok(is_there)
    }

    /// Locks it; no other client can write then. EROFS if another one has it.
    pub(super) fn lock(&self) -> io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { (self.functions.rbd_lock_acquire)(self.handle(), EXCLUSIVE) })
    }

    /// Takes the lock from `owner`, which is gone, and bars it from the cluster: none of its writes is done after this.
    /// Without effect if `owner` does not have the lock any more.
    pub(super) fn break_lock(&self, owner: &str) -> Result<(), RbdError> {
        let owner = text(owner)?;
        // SAFETY: the image is open, and the text ends with a NUL.
        let result =
            unsafe { (self.functions.rbd_lock_break)(self.handle(), EXCLUSIVE, owner.as_ptr()) };
        // It has been released meanwhile, or another client has taken it.
        if matches!(-result, libc::ENOENT | libc::EBUSY) {
            return Ok(());
        }
        self.step(
            "take the lock from the server before this one",
            result,
            CAPS,
        )
    }

    /// Notes in the image which client may write to it. Without effect on other clients.
    pub(super) fn note_writer(&self, client: &str) -> io::Result<()> {
        let client = CString::new(client)?;
        // SAFETY: the image is open, and both texts end with a NUL.
        check(unsafe {
            (self.functions.rbd_metadata_set)(self.handle(), WRITER.as_ptr(), client.as_ptr())
        })
    }

    /// The client that was noted last.
    pub(super) fn writer(&self) -> io::Result<String> {
        let (mut value, mut len) = ([0; 256], 256);
        // SAFETY: the image is open, the text ends with a NUL, the array is as long as is said.
        check(unsafe {
            (self.functions.rbd_metadata_get)(
                self.handle(),
                WRITER.as_ptr(),
                value.as_mut_ptr(),
                &raw mut len,
            )
        })?;
        Ok(read_text(&value))
    }

    /// Gives the lock back.
    pub(super) fn unlock(&self) -> io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { (self.functions.rbd_lock_release)(self.handle()) })
    }

    /// Waits until all that was written is durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        // SAFETY: the image is open.
        check(unsafe { (self.functions.rbd_flush)(self.handle()) })
    }

    /// Has `tell` called when another client changes it. A snapshot does not change.
    pub(super) fn on_change(&self, tell: Changed) {
        if self.name.snapshot.is_some() {
            return;
        }
        let watched = match self.read_only {
            true => self.watch_header(tell),
            false => {
                // SAFETY: the image is closed after the watch has ended.
                let watch = unsafe { UpdateWatch::new(self.functions, self.handle(), tell) };
                watch.map(|watch| *locked(&self.update_watch) = Some(watch))
            }
        };
        self.warn_unwatched(watched);
    }

    fn watch_header(&self, tell: Changed) -> Result<(), c_int> {
        let header = (self.id().ok()).and_then(|id| text(&format!("rbd_header.{id}")).ok());
        let header = header.ok_or(-libc::EIO)?;
        let place = (self.cluster.handle(), self.pool);
        // SAFETY: client and pool are closed after the watch has ended.
        let watch = unsafe { HeaderWatch::new(self.functions, place, header, tell) };
        *locked(&self.header_watch) = Some(watch?);
        Ok(())
    }

    fn warn_unwatched(&self, watched: Result<(), c_int>) {
        if let Err(result) = watched {
            let (name, error) = (&self.name, system_error(result));
            tracing::warn!(
                "rbd:{name}: another size is not noticed, but by 'ublkup resize': {error}"
            );
        }
    }

    /// The cluster has barred this client, or its lock is gone, which comes just before or after: it is not closed, but left
    /// to the end of the process. Closing a barred one ends the process (std::out_of_range in librbd 16.2) or does not
    /// return, in one case of three. Others are not hindered: it has no lock.
    pub(super) fn abandon(&self) {
        self.abandoned.store(true, Ordering::Relaxed);
    }

    /// Gives it another size.
    pub(super) fn resize(&self, size_bytes: u64, may_shrink: bool) -> io::Result<()> {
        // SAFETY: the image is open; there is no callback.
        check(unsafe {
            (self.functions.rbd_resize2)(self.handle(), size_bytes, may_shrink, None, null_mut())
        })
    }

    fn step(&self, what: &'static str, result: c_int, hint: &'static str) -> Result<(), RbdError> {
        step(&self.name, what, result, hint)
    }
}

impl Drop for OpenImage {
    fn drop(&mut self) {
        let watches = (
            locked(&self.update_watch).take(),
            locked(&self.header_watch).take(),
        );
        if self.abandoned.load(Ordering::Relaxed) {
            // The library may still call it.
            std::mem::forget(watches);
            return;
        }
        drop(watches);
        // SAFETY: what is not null was made, and no other code uses it: queues hold `self`.
        unsafe {
            let older = std::mem::take(&mut *locked(&self.older));
            let image = *self.image.get_mut();
            for image in older
                .into_iter()
                .chain([image])
                .filter(|image| !image.is_null())
            {
                (self.functions.rbd_close)(image);
            }
            if !self.pool.is_null() {
                (self.functions.rados_ioctx_destroy)(self.pool);
            }
            ManuallyDrop::drop(&mut self.cluster);
        }
    }
}

unsafe extern "C" {
    /// on_exit(3).
    fn on_exit(handler: extern "C" fn(c_int, *mut c_void), argument: *mut c_void) -> c_int;
}

/// Has the process end without the destructors of the library: its threads may still run, and use what is destroyed. Then the
/// process is aborted, or does not end.
fn end_without_destructors() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handler is a function for that, and has no argument. If there is no room for it the process ends as it
        // would without it. It is called before those of the library, which was loaded before.
        let _ = unsafe { on_exit(end_at_once, null_mut()) };
    });
}

/// Ends the process without any destructors.
extern "C" fn end_at_once(status: c_int, _: *mut c_void) {
    // SAFETY: ends the process; all that is to be written has been, as after exit(3) nothing of this program runs.
    unsafe { libc::_exit(status) }
}

/// Does `work`, and says in the log if that takes long.
fn reminded<T>(name: &ImageName, work: impl FnOnce() -> T) -> T {
    let (done, end) = mpsc::channel::<()>();
    let remind = move || {
        if end.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("rbd:{name}: still waiting for the cluster (ceph -s says how it is)");
        }
    };
    thread::scope(|scope| {
        // Without the thread nothing is said.
        let _ = thread::Builder::new().spawn_scoped(scope, remind);
        let result = work();
        drop(done);
        result
    })
}

/// What is in these locks is whole whatever panicked.
fn locked<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

fn check(result: c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        error => Err(system_error(error)),
    }
}
