//! The two front-ends and the one fact that they must agree on: who may write.
//!
//! A door turns what its clients send into requests and answers them; what a queue thread needs of
//! it is [`DoorQueue`](crate::engine::DoorQueue). The doors never import each other, nor storage.

pub mod ownership;
pub mod ublk;
pub mod vhost;
