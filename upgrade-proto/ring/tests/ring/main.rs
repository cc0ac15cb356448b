//! Rings between two ends in one process, of the kind that `common` says. What only a shared ring has is tested
//! with that one. Each test has a registry of its own.

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/tools.rs"]
mod tools;

mod calls;
mod closing;
mod negotiation;
mod pair;
