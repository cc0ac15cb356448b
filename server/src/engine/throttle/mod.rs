//! Limits on what the clients of an export may do: requests and bytes per second.
//!
//! | file        | tells                                                          |
//! |-------------|----------------------------------------------------------------|
//! | `limits.rs` | what can be limited                                            |
//! | `bucket.rs` | one limit: how much may be used, and from when on              |
//! | `shared.rs` | the limits of an export, which can change while it is served   |
//! | `gate.rs`   | what one queue thread lets pass, and what it holds back        |
//!
//! The limits are one export's, and so shared by its doors and their queue threads, without a lock: a thread takes a
//! few requests or bytes at a time from a bucket, and what it gets is the right to use them from a
//! certain time on. Threads that take in turn get consecutive times, so that none overtakes another.
//!
//! Without limits a queue thread compares one number in each round of its loop.

mod bucket;
mod gate;
mod limits;
mod shared;

pub(crate) use gate::Gate;
pub use limits::RateLimits;
pub use shared::Throttle;
