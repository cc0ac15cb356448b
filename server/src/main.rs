//! The `ublkup` command.

fn main() {}
