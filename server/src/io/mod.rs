//! io_uring and what goes with it. Knows nothing of disks.
//!
//! A [`Ring`] belongs to one thread. What is put on it carries a [`Token`] that says what gets the
//! completion. A [`SlotTable`] holds what is in flight.

mod anonymous;
mod enter;
mod restrictions;
mod ring;
mod slots;
mod token;

pub use anonymous::AnonymousMemory;
pub use restrictions::{
    ThreadRestrictions, are_rings_restricted, build_restricted, leave_rings_unrestricted,
};
pub use ring::{Completion, Full, Ring};
pub use slots::{FreeSlots, Slot, SlotTable};
pub use token::{Owner, Token};
