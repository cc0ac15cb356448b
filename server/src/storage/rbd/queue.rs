//! Requests to librbd, and what comes back.

use std::ffi::{c_int, c_void};
use std::io;
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Duration;

use super::library::{Completion, Functions, THICK};
use super::shared::Shared;
use crate::engine::StorageQueue;
use crate::engine::inbox::{Inbox, Post, Ticket};
use crate::io::{Ring, Slot};
use crate::request::{IoError, Op, Progress, Request};

/// Memory for data that a slot keeps for its next request. What larger requests take beyond it is freed with them: with 128
/// slots, and several queues, it would add up.
const KEPT_BYTES: usize = 128 << 10;

/// In the place of a result: the request is to be done anew. Reads are shorter.
const AGAIN: i32 = i32::MAX;

/// One thread's access to an image.
///
/// The library reads and writes only memory of this queue: the client's may go away at any time.
pub struct RbdQueue {
    shared: Arc<Shared>,
    inbox: Inbox,
    /// By slot, the data of its request. It is not touched while the library has the request.
    data: Box<[Vec<u8>]>,
}

/// What a completion carries through the library.
struct Errand {
    functions: &'static Functions,
    post: Post,
    ticket: Ticket,
}

impl RbdQueue {
    pub(super) fn new(shared: Arc<Shared>, slots: u32) -> io::Result<Self> {
        Ok(Self {
            shared,
            inbox: Inbox::new(slots)?,
            data: (0..slots).map(|_| Vec::new()).collect(),
        })
    }

    /// Gives a request that was refused to the library again, when the lock is had that it was refused for. It had not
    /// gone to the cluster: what has, and is still under way, is in no order with it, as with any other request under way.
    fn wait_for_lock(&mut self, slot: Slot) {
        let (ticket, post) = (self.inbox.expect(slot), self.inbox.post());
        let wake = move || post.deliver(ticket, AGAIN);
        self.shared.regain(Box::new(wake));
    }

    /// Gives a request to the library.
    fn give(&mut self, slot: Slot, request: &Request) {
        let ticket = self.inbox.expect(slot);
        let post = self.inbox.post();
        let result = self.submit(slot, request, post.clone(), ticket);
        if result < 0 {
            post.deliver(ticket, result);
        }
    }

    fn submit(&mut self, slot: Slot, request: &Request, post: Post, ticket: Ticket) -> c_int {
        let (functions, image) = (self.shared.image.functions, self.shared.image.handle());
        let errand = Box::into_raw(Box::new(Errand {
            functions,
            post,
            ticket,
        }));
        let mut completion = null_mut();
        // SAFETY: the completion is written; the callback gets the errand, which nothing else has then.
        let made = unsafe {
            (functions.rbd_aio_create_completion)(errand.cast(), ended, &raw mut completion)
        };
        if made < 0 {
            // SAFETY: it was made above, and no completion has it.
            drop(unsafe { Box::from_raw(errand) });
            return made;
        }
        let (offset, len) = (request.offset_bytes(), request.len_bytes());
        // No truncation: a request is as long as memory or, without data, as `Limits` allow.
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        let data = &mut self.data[slot as usize];
        // SAFETY: the image stays open as long as `shared`. Data is at the same place, of that length, and not touched,
        // until the request has ended, and the queue is not dropped before (`quiesce`).
        let given = unsafe {
            match request.op() {
                Op::Read => {
                    data.resize(size, 0);
                    let to = data.as_mut_ptr().cast();
                    (functions.rbd_aio_read)(image, offset, size, to, completion)
                }
                Op::Write { .. } => {
                    data.resize(size, 0);
                    gather(request, data);
                    let from = data.as_ptr().cast();
                    (functions.rbd_aio_write)(image, offset, size, from, completion)
                }
                Op::Flush => (functions.rbd_aio_flush)(image, completion),
                Op::Discard => (functions.rbd_aio_discard)(image, offset, len, completion),
                Op::WriteZeroes { unmap, .. } => {
                    let flags = if unmap { 0 } else { THICK };
                    (functions.rbd_aio_write_zeroes)(image, offset, size, completion, flags, 0)
                }
            }
        };
        if given < 0 {
            // SAFETY: a request that was refused calls nothing back, so both are ours.
            unsafe {
                (functions.rbd_aio_release)(completion);
                drop(Box::from_raw(errand));
            }
        }
        given
    }
}

/// The callback of every request, on a thread of the library.
extern "C" fn ended(completion: Completion, errand: *mut c_void) {
    // SAFETY: the errand was made for this completion alone, which ends once.
    let errand = unsafe { Box::from_raw(errand.cast::<Errand>()) };
    // SAFETY: the completion is the library's and valid until it is released.
    let result = unsafe {
        let result = (errand.functions.rbd_aio_get_return_value)(completion);
        (errand.functions.rbd_aio_release)(completion);
        result
    };
    // Both an errno and the length of a read fit.
    let result = i32::try_from(result).unwrap_or(-libc::EIO);
    errand.post.deliver(errand.ticket, result);
}

/// Copies the data of a write.
fn gather(request: &Request, mut to: &mut [u8]) {
    for part in request.buffers().memory() {
        let copied = part.copy_to(to);
        to = &mut to[copied..];
    }
}

/// Copies the data of a read. Beyond what was `read` it is zero.
fn scatter(request: &Request, data: &mut [u8], read: usize) {
    data[read..].fill(0);
    let mut from = &data[..];
    for part in request.buffers().memory() {
        part.copy_from(from);
        from = &from[part.len()..];
    }
}

impl StorageQueue for RbdQueue {
    fn start(&mut self, _: &mut Ring, slot: Slot, request: &mut Request) -> Progress {
        if self.shared.is_fenced() {
            return Progress::Done(Err(IoError::Io));
        }
        self.give(slot, request);
        Progress::Pending
    }

    fn advance(
        &mut self,
        ring: &mut Ring,
        slot: Slot,
        request: &mut Request,
        _kind: u16,
        result: i32,
    ) -> Progress {
        let result = match result {
            // Not had again.
            AGAIN if self.shared.is_fenced() => -libc::EROFS,
            AGAIN => return self.start(ring, slot, request),
            result if -result == libc::EROFS && !self.shared.is_fenced() => {
                self.wait_for_lock(slot);
                return Progress::Pending;
            }
            result => result,
        };
        let data = &mut self.data[slot as usize];
        // Negative for an error. A read returns how much there was.
        let outcome = match usize::try_from(result) {
            Ok(read) => {
                if request.op() == Op::Read {
                    let read = read.min(data.len());
                    scatter(request, data, read);
                }
                Ok(())
            }
            Err(_) => Err(self.shared.failed(request, -result)),
        };
        data.truncate(KEPT_BYTES);
        data.shrink_to(KEPT_BYTES);
        Progress::Done(outcome)
    }

    fn next_result(&mut self) -> Option<(Slot, i32)> {
        self.inbox.next_result()
    }

    fn has_results(&self) -> bool {
        self.inbox.has_results()
    }

    fn listen(&mut self, ring: &mut Ring) -> bool {
        self.inbox.listen(ring)
    }

    fn rang(&mut self, _: &mut Ring, _kind: u16) {
        self.inbox.rang();
    }

    fn quiesce(&mut self, limit: Duration) -> bool {
        self.inbox.quiesce(limit)
    }
}
