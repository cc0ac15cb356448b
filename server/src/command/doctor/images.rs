//! Storages beyond this machine's files that exports have: images of clusters, disks of other servers.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Finding, Verdict};
use crate::command::left;
use crate::config::{ExportConfig, ExportOptions, StorageSpec, is_configured, read_config};
use crate::export::runtime_dir::RuntimeDir;
use crate::request::format_size;
use crate::storage::{ImageName, Qemu, Rbd, VhostUser, VhostUserError};

/// A finding for each export with such an image in `configuration`, or noted in the runtime directory. Without one nothing
/// of Ceph is needed, and nothing is loaded.
pub(super) fn findings(dir: &RuntimeDir, configuration: &Path) -> Vec<Finding> {
    let configured = match is_configured(configuration) {
        // A file that is wrong is told by the server.
        true => read_config(configuration, &ExportOptions::default()).unwrap_or_default(),
        false => Vec::new(),
    };
    let names = dir.names().unwrap_or_default();
    let noted = names.iter().filter_map(|name| left::saved(dir, name).ok());
    let all = configured.into_iter().chain(noted);
    let by_name: BTreeMap<_, _> = all.map(|export| (export.name.clone(), export)).collect();
    by_name.values().filter_map(examine).collect()
}

fn examine(export: &ExportConfig) -> Option<Finding> {
    let (verdict, finding) = match &export.storage {
        StorageSpec::Rbd(image) => examine_image(image, export.read_only),
        StorageSpec::VhostUser { socket } => match VhostUser::examine(socket) {
            Ok(size_bytes) => {
                let size = format_size(size_bytes);
                (
                    Verdict::Ok,
                    format!("vhost-user:{}, {size}", socket.display()),
                )
            }
            // It may be that the export is served, and has the server.
            Err(error @ VhostUserError::Step { .. }) => (Verdict::Warning, error.to_string()),
            Err(error) => (Verdict::Problem, error.to_string()),
        },
        StorageSpec::Qemu(disk) => match Qemu::check_installed() {
            Ok(program) => (Verdict::Ok, format!("{disk}, by {}", program.display())),
            Err(why) => (Verdict::Problem, format!("{disk}: {why}")),
        },
        _ => return None,
    };
    Some((verdict, format!("{}: {finding}", export.name)))
}

fn examine_image(image: &ImageName, read_only: bool) -> (Verdict, String) {
    match Rbd::check(image, read_only) {
        Ok(found) => {
            let size = format_size(found.size_bytes);
            let owner = match found.owner {
                Some(owner) => format!("client {owner} has it"),
                None => "no client has it".into(),
            };
            match found.lacks {
                None => (Verdict::Ok, format!("rbd:{image}, {size}, {owner}")),
                Some(lacks) => (Verdict::Warning, format!("rbd:{image}, {owner}: {lacks}")),
            }
        }
        Err(error) => (Verdict::Problem, error.to_string()),
    }
}
