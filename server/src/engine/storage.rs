//! What doors and queue threads need of a storage.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::sharing::Sharing;
use crate::io::{Ring, Slot};
use crate::request::{Limits, Progress, Request};

/// Called once, with the reason, when another server has taken a storage from this one.
pub type Fenced = Box<dyn Fn(String) + Send + Sync>;

/// Called, from any thread, when another program may have changed a storage's size. It does not wait.
pub type Changed = Box<dyn Fn() + Send + Sync>;

/// The steps of a snapshot. The program that asks for them exchanges the image's file between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotStep {
    /// Flush the image, and write nothing to it any more: requests wait.
    Begin,
    /// Write what the image has over its backing file into that, or say how far that is.
    Merge,
    /// When all is merged: write nothing to the image any more; requests wait.
    Finish,
    /// End merging. The image is what it was.
    Cancel,
    /// Serve the requests again, from the image that is there now.
    Resume,
}

impl SnapshotStep {
    /// What has been done, for the log.
    #[must_use]
    pub fn past(self) -> &'static str {
        match self {
            Self::Begin => "the image is flushed, requests wait",
            Self::Merge => "the image is being merged",
            Self::Finish => "the image is merged, requests wait",
            Self::Cancel => "merging was ended",
            Self::Resume => "requests are served again",
        }
    }
}

/// How far a step of a snapshot is.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SnapshotProgress {
    /// Bytes that were merged.
    pub done_bytes: u64,
    /// Of how many. Writes of clients add to them.
    pub total_bytes: u64,
    /// Whether all are, and those that clients write are merged at once.
    pub is_ready: bool,
    /// Why requests still wait: the image that is there cannot be served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

/// A disk as a whole: what does not concern a single request.
pub trait StorageControl: Send + Sync + 'static {
    /// What the disk is and what it takes.
    fn limits(&self) -> &Limits;

    /// What identifies the storage on this machine until it is restarted, where that is not its
    /// configuration alone: a path may lead to another file after a while.
    fn identity(&self) -> Option<String> {
        None
    }

    /// The last request that the storage failed: operation, place and cause.
    fn last_error(&self) -> Option<String> {
        None
    }

    /// Whether requests may come with their data in the ring's table ([`Buffers::ring`]).
    ///
    /// [`Buffers::ring`]: crate::request::Buffers::ring
    fn ring_buffers(&self) -> RingBuffers {
        RingBuffers::No
    }

    /// Takes the memory that requests will lie in, if the storage hands it on to another process.
    fn sharing(&self) -> Option<Arc<dyn Sharing>> {
        None
    }

    /// Why requests wait at present, if that is known: for messages.
    fn waits_for(&self) -> Option<String> {
        None
    }

    /// Makes the storage at least `wanted_bytes` long, if a length is given, and returns its length.
    /// The capacity that doors advertise does not change: see [`Limits::capacity`].
    ///
    /// # Errors
    ///
    /// When this storage cannot change its size, or not to that one.
    fn grow(&self, wanted_bytes: Option<u64>) -> io::Result<u64> {
        let now = self.limits().capacity.bytes();
        match wanted_bytes {
            Some(wanted) if wanted != now => {
                Err(io::Error::other("a disk in memory cannot change"))
            }
            _ => Ok(now),
        }
    }

    /// Truncates the storage to `capacity_bytes`.
    ///
    /// # Errors
    ///
    /// When that cannot be done.
    fn cut(&self, _capacity_bytes: u64) -> io::Result<()> {
        Err(io::Error::other("this disk cannot shrink"))
    }

    /// Does a step of a snapshot. For the first [`SnapshotStep::Merge`] the backing file has to be locked by a program that can
    /// write to it. Returns what there is to say: to `Merge`, how many bytes of how many are merged, and whether it is ready.
    ///
    /// # Errors
    ///
    /// When the storage has no snapshots, or the step cannot be done.
    fn snapshot(&self, _step: SnapshotStep) -> io::Result<SnapshotProgress> {
        Err(io::Error::other(
            "snapshots are made of images of qcow2: (those of Ceph by rbd snap create, of others by their file system)",
        ))
    }

    /// Claims storage that was opened without a claim: no other process may write to it. Returns whether it was
    /// not claimed before.
    ///
    /// # Errors
    ///
    /// When another process has it for longer than `limit`, or it has changed in a way that this
    /// disk cannot continue with.
    fn claim(&self, _limit: Duration) -> Result<bool, String> {
        Ok(false)
    }

    /// Has `tell` called when another server takes the storage from this one. All requests fail from then on.
    fn on_fenced(&self, _tell: Fenced) {}

    /// Has `tell` called when another program may have changed the storage's size, where that can be learned.
    fn on_change(&self, _tell: Changed) {}

    /// The export has ended, though threads may still wait for requests: nothing of these may reach the storage any more,
    /// since another server may have it from now on.
    fn end(&self) {}

    /// Flushes, then gives up a [claim](Self::claim), so that another server may take it.
    fn release(&self) {}
}

/// A disk that queue threads can work with.
pub trait Storage: StorageControl {
    /// The part of the disk that one queue thread works with.
    type Queue: StorageQueue;

    /// How many operations beside those of requests a queue may have on its ring at once.
    const RING_OPERATIONS: u32 = 0;

    /// The limits, to be changed before there is a queue: a block device that exists already keeps
    /// those that it was made with.
    fn limits_mut(&mut self) -> &mut Limits;

    /// A queue for requests in slots 0 to `slots` - 1, to be used with `ring` only.
    ///
    /// # Errors
    ///
    /// When the kernel refuses what the queue needs.
    fn queue(&self, ring: &mut Ring, slots: u32) -> io::Result<Self::Queue>;
}

/// Whether a storage takes requests whose data is in the ring's buffer table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingBuffers {
    /// It must reach the data in memory.
    No,
    /// Supported, no gain.
    Possible,
    /// Cheaper than data in memory.
    Better {
        /// Required alignment of pieces of memory: a power of two.
        alignment_bytes: u32,
    },
}

/// One thread's access to a disk.
///
/// Completions of what a queue puts on the ring must carry the slot of the request as their
/// token's index and [`crate::io::Owner::Storage`] as owner.
///
/// A request may also end elsewhere: on a thread of a library, in another process. Its result then comes by
/// [`next_result`](Self::next_result), as that of an operation of kind 0; an [`Inbox`](super::inbox::Inbox) does what
/// that takes.
pub trait StorageQueue {
    /// Begins a request, or continues one for which the queue last said [`Progress::Full`].
    fn start(&mut self, ring: &mut Ring, slot: Slot, request: &mut Request) -> Progress;

    /// Continues the request in `slot` after a completion.
    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        kind: u16,
        result: i32,
    ) -> Progress;

    /// The client of the requests under way is gone. Those that are done in pieces end, as failed, with the piece
    /// that is being done. Those that end elsewhere are waited for: a write that reached the disk after those of the next
    /// client would undo them.
    fn abandon(&mut self) {}

    /// The slot and the result of a request that ended elsewhere.
    #[inline]
    fn next_result(&mut self) -> Option<(Slot, i32)> {
        None
    }

    /// Whether there are such results. Called again and again by a thread that polls.
    #[inline]
    fn has_results(&self) -> bool {
        false
    }

    /// Prepares for sleep: from now on such a result completes an operation of [`crate::io::Owner::Bell`] on the ring.
    /// Returns false when there is one already.
    #[inline]
    fn listen(&mut self, _ring: &mut Ring) -> bool {
        true
    }

    /// An operation of [`crate::io::Owner::Bell`], of this kind, has completed.
    fn rang(&mut self, _ring: &mut Ring, _kind: u16) {}

    /// Waits, for at most `limit`, until nothing outside of this thread and its ring uses memory of a request. Returns
    /// whether that was reached; if not, the memory is leaked. The thread calls nothing else after it.
    fn quiesce(&mut self, _limit: Duration) -> bool {
        true
    }
}
