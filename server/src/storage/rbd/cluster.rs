//! A client of a cluster.

use std::ffi::CStr;
use std::ptr::{null, null_mut};

use super::error::{RbdError, step, text};
use super::library::{Functions, Rados, read_text};
use super::name::ImageName;

/// What a user needs to open, write and lock images, and to bar a dead client from the cluster.
pub(super) const CAPS: &str =
    "; its user needs the caps mon 'profile rbd' osd 'profile rbd pool=POOL' (ceph auth caps)";

/// Seconds until a connection fails if no monitor answers.
const CONNECT_LIMIT: &CStr = c"30";

/// What the promises of a disk depend on. Metadata of an image or a pool could say something else.
pub(super) const OWN_OPTIONS: [(&CStr, &CStr); 5] = [
    // A request that has ended is durable.
    (c"rbd_cache", c"false"),
    (c"rbd_plugins", c""),
    (c"rbd_persistent_cache_mode", c"disabled"),
    // Data is copied before a write returns: its memory is the client's.
    (c"rbd_disable_zero_copy_writes", c"true"),
    // The owner of a lock that is broken is barred from the cluster.
    (c"rbd_blocklist_on_break_lock", c"true"),
];

/// The client. Its threads end with it.
pub(super) struct Cluster {
    functions: &'static Functions,
    rados: Rados,
    id: String,
}

impl Cluster {
    /// Connects to the cluster of an image.
    pub(super) fn connect(
        functions: &'static Functions,
        name: &ImageName,
    ) -> Result<Self, RbdError> {
        // From here on dropping it undoes what has been done.
        let mut this = Self {
            functions,
            rados: null_mut(),
            id: String::new(),
        };
        this.configure(name)?;
        this.connect_as_configured(name)?;
        Ok(this)
    }

    fn configure(&mut self, name: &ImageName) -> Result<(), RbdError> {
        let functions = self.functions;
        let user = name.user.as_deref().unwrap_or("admin");
        let user = text(&format!("client.{user}"))?;
        let conf = (name.conf.as_ref()).map(|path| text(&path.to_string_lossy()));
        let conf = conf.transpose()?;
        // SAFETY: both texts end with a NUL, and the handle is written.
        let result = unsafe {
            (functions.rados_create2)(&raw mut self.rados, c"ceph".as_ptr(), user.as_ptr(), 0)
        };
        step(name, "make a client of the cluster", result, "")?;
        let path = conf.as_ref().map_or(null(), |path| path.as_ptr());
        // SAFETY: the client was made; without a path the library looks where Ceph's programs look.
        let result = unsafe { (functions.rados_conf_read_file)(self.rados, path) };
        step(
            name,
            "read the cluster's configuration",
            result,
            "; give the right one with conf=/etc/ceph/ceph.conf",
        )?;
        for (option, value) in OWN_OPTIONS {
            // SAFETY: as above. Options that a version does not know are not needed there.
            unsafe { (functions.rados_conf_set)(self.rados, option.as_ptr(), value.as_ptr()) };
        }
        for (option, value) in [
            // What it has to say goes where this program's log goes.
            (c"log_file", c""),
            (c"log_to_stderr", c"true"),
            (c"err_to_stderr", c"true"),
        ] {
            // SAFETY: as above. Options that a version does not know are not needed there.
            unsafe { (functions.rados_conf_set)(self.rados, option.as_ptr(), value.as_ptr()) };
        }
        self.limit_connecting();
        Ok(())
    }

    fn connect_as_configured(&mut self, name: &ImageName) -> Result<(), RbdError> {
        let functions = self.functions;
        // SAFETY: as above.
        let result = unsafe { (functions.rados_connect)(self.rados) };
        let hint = match -result {
            libc::ENOENT => {
                "; its configuration names no monitor, or the keyring of its user is not there"
            }
            libc::EPERM | libc::EACCES => "; the cluster does not know its user's key",
            libc::ETIMEDOUT => "; no monitor of the cluster answers",
            _ => "",
        };
        step(name, "connect to the cluster", result, hint)?;
        let mut id = [0; 64];
        // SAFETY: the array is as long as is said.
        unsafe { (functions.rados_cluster_fsid)(self.rados, id.as_mut_ptr(), id.len()) };
        self.id = read_text(&id);
        Ok(())
    }

    /// Has a connection without an answer fail after [`CONNECT_LIMIT`], unless the configuration sets a limit: a service
    /// manager tries again.
    fn limit_connecting(&self) {
        let option = c"client_mount_timeout".as_ptr();
        let mut value = [0; 32];
        // SAFETY: the client was made, texts end with a NUL, and the array is as long as is said.
        unsafe {
            (self.functions.rados_conf_get)(self.rados, option, value.as_mut_ptr(), value.len());
            if is_default_limit(&read_text(&value)) {
                (self.functions.rados_conf_set)(self.rados, option, CONNECT_LIMIT.as_ptr());
            }
        }
    }

    /// Its handle.
    pub(super) fn handle(&self) -> Rados {
        self.rados
    }

    /// The number of the cluster.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Whether this user may bar a dead client from the cluster, without which its lock cannot be taken. The command is one
    /// that `profile rbd` allows, with an address that the monitors do not take: what they check first is the right.
    pub(super) fn may_bar(&self) -> bool {
        let command =
            c"{\"prefix\": \"osd blocklist\", \"blocklistop\": \"add\", \"addr\": \"none/1\"}";
        let mut commands = [command.as_ptr()];
        // SAFETY: the client is connected, the text ends with a NUL; no input is given and no output taken.
        let result = unsafe {
            (self.functions.rados_mon_command)(
                self.rados,
                commands.as_mut_ptr(),
                commands.len(),
                null(),
                0,
                null_mut(),
                null_mut(),
                null_mut(),
                null_mut(),
            )
        };
        !matches!(-result, libc::EACCES | libc::EPERM)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.rados.is_null() {
            // SAFETY: it was made, and no other code uses it. It may be connected or not: the threads of one that
            // could not connect end, too.
            unsafe { (self.functions.rados_shutdown)(self.rados) };
        }
    }
}

/// Whether a limit for connecting is what Ceph sets, five minutes. Versions write numbers differently.
fn is_default_limit(seconds: &str) -> bool {
    let seconds = seconds.trim().parse::<f64>();
    seconds.is_ok_and(|seconds| (seconds - 300.0).abs() < 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_that_ceph_sets_is_known_however_it_is_written() {
        for default in ["300", "300.000000", " 300.0", "3e2"] {
            assert!(is_default_limit(default), "{default}");
        }
        for own in ["30", "3000", "301", "0", "", "300 s", "inf", "nan"] {
            assert!(!is_default_limit(own), "{own}");
        }
    }
}
