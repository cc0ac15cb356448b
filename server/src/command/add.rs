//! `ublkup add`: more exports for a server that runs.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use upgrade_proto::{TrustedDir, printable};

use super::output::{complain, print_json_text, print_line};
use crate::config::{ExportConfig, Origin};
use crate::export::admin::{self, ExportStatus, ServerStatus};
use crate::export::runtime_dir::RuntimeDir;
use crate::export::{Door, explain};

/// A server that does not answer within this time is reported as not answering.
const LIMIT: Duration = Duration::from_secs(5);

/// A storage may take this long to open.
const ADD_LIMIT: Duration = Duration::from_secs(60);

/// Adds exports to a server; one that cannot be added does not keep the others from it.
///
/// # Errors
///
/// When there is no such server, or nothing can be printed.
pub fn run(
    dir: &RuntimeDir,
    exports: Vec<ExportConfig>,
    server: Option<&str>,
    json: bool,
) -> Result<ExitCode> {
    let server = find(dir, server)?;
    let mut code = ExitCode::SUCCESS;
    for mut export in exports {
        export.saved.origin = Origin::Added(server.server.clone());
        match add(dir, &server, &export) {
            Ok(status) if json => print_json_text(&serde_json::to_string(&status)?)?,
            Ok(status) => {
                let ublk = status.ublk.map(|door| (Door::Ublk, door.device));
                let vhost = status.vhost.map(|door| (Door::Vhost, door.socket));
                for (door, path) in ublk.into_iter().chain(vhost) {
                    let path = printable(&path.display().to_string());
                    print_line(&format!("{} {door} {path}", export.name))?;
                }
            }
            Err(error) => {
                complain(&explain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}

/// Adds one export to a server.
pub(super) fn add(
    dir: &RuntimeDir,
    server: &ServerStatus,
    export: &ExportConfig,
) -> Result<ExportStatus> {
    crate::export::add(dir, server, export, ADD_LIMIT)
        .with_context(|| format!("{} is not added", export.name))
}

/// The server of this name, or the only one.
pub(super) fn find(dir: &RuntimeDir, name: Option<&str>) -> Result<ServerStatus> {
    let servers = dir.server_names()?;
    let name = match (name, &servers[..]) {
        (Some(name), _) if servers.iter().any(|server| server == name) => name,
        (None, [only]) => only,
        (_, []) => bail!(
            "no server runs under {}: 'ublkup serve' starts one",
            dir.path().display()
        ),
        (Some(name), _) => bail!(
            "no server called '{name}' runs; there are: {}",
            servers.join(", ")
        ),
        (None, _) => bail!(
            "several servers run: choose one of them: {}",
            servers.join(", ")
        ),
    };
    let status = admin::server(&server_socket(dir, name)?, LIMIT)
        .with_context(|| format!("server '{name}' does not answer"))?;
    ensure!(
        status.server == *name,
        "server '{name}' calls itself '{}'",
        status.server
    );
    Ok(status)
}

/// The admin socket of a server, in a folder that no other user can exchange.
pub(super) fn server_socket(dir: &RuntimeDir, name: &str) -> Result<PathBuf> {
    let socket = dir.server_socket(name);
    if let Some(folder) = socket.parent() {
        TrustedDir::open(folder)?;
    }
    Ok(socket)
}
