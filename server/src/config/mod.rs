//! From a command line, SPECs and a configuration file to one validated [`ExportConfig`] for each export.
//!
//! | file         | tells                                               |
//! |--------------|-----------------------------------------------------|
//! | `options.rs` | the options of an export, each once                 |
//! | `spec.rs`    | `[NAME=]KIND:ARG[,key=value…]`                      |
//! | `file.rs`    | the configuration file                              |
//! | `export.rs`  | from SPEC and options to a validated export         |
//! | `commas.rs`  | lists with commas, also those of QEMU               |
//! | `name.rs`    | names of exports                                    |
//! | `error.rs`   | why a configuration is refused                      |
//!
//! The nearest word wins: a key of the SPEC before one of its `[[export]]` table, that before `[defaults]`, and
//! those before the command line.

pub mod commas;
mod error;
mod export;
mod file;
mod name;
mod options;
mod spec;

pub use error::ConfigError;
pub use export::{Difference, ExportConfig, Origin, SavedExport, check_together};
pub use file::{is_configured, read_config};
pub use name::check_name;
pub use options::{DoorMode, ExportOptions, switch};
pub use spec::{Spec, StorageSpec};
