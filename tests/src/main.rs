//! `cargo lab`: see `docs/lab.md`.

use std::process::ExitCode;

fn main() -> ExitCode {
    lab::cli::main()
}
