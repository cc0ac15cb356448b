//! Peers that speak the protocol and then do what they like with the shared memory: in a ring of the kind that
//! `common` says where both kinds have it, in a shared one where only that has it.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/tools.rs"]
mod tools;

mod negotiation;
mod peer;
mod scribbling;
