//! The commands that talk to servers: `list`, `stat`, `resize`, `stop`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::output::{count, print};
use crate::config::check_name;
use crate::door::ublk::DataPath;
use crate::engine::counters::Totals;
use crate::export::admin::{self, ExportStatus};
use crate::export::explain;
use crate::export::name_lock::CONTROL;
use crate::export::runtime_dir::RuntimeDir;
use crate::request::format_size;

/// A server that does not answer within this time is reported as not answering.
const STAT_LIMIT: Duration = Duration::from_secs(5);

/// Draining ends when the storage has completed its requests, which may take long.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// `ublkup list`
///
/// # Errors
///
/// When the runtime directory cannot be read.
pub fn list(dir: &RuntimeDir, json: bool) -> Result<ExitCode> {
    let mut code = ExitCode::SUCCESS;
    let mut exports = Vec::new();
    for name in dir.names()? {
        if !dir.is_alive(&name) {
            tracing::warn!(
                "{name}: its server has died; 'ublkup recover {name}' serves it again, 'ublkup doctor --clean' \
                 removes what is left of it"
            );
            continue;
        }
        match admin::stat(&dir.folder(&name).join(CONTROL), STAT_LIMIT) {
            Ok(status) => exports.push(status),
            Err(error) => {
                eprintln!("ublkup: {name}: {}", explain(&error));
                code = ExitCode::FAILURE;
            }
        }
    }
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&exports)?))?;
    } else {
        print(&table(&exports))?;
    }
    Ok(code)
}

/// `ublkup stat`
///
/// # Errors
///
/// When the export is not served or does not answer.
pub fn stat(dir: &RuntimeDir, name: &str, json: bool, watch: bool) -> Result<ExitCode> {
    loop {
        let status = admin::stat(&served(dir, name)?.join(CONTROL), STAT_LIMIT)
            .with_context(|| format!("{name} does not answer"))?;
        let text = match json {
            // One line each: a program reads them as they come.
            true if watch => serde_json::to_string(&status)?,
            true => serde_json::to_string_pretty(&status)?,
            false => details(&status),
        };
        print(&format!("{text}\n"))?;
        if !watch {
            return Ok(ExitCode::SUCCESS);
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `ublkup stop`
///
/// # Errors
///
/// When the export is not served, or in use, or does not end.
pub fn stop(dir: &RuntimeDir, name: &str, force: bool) -> Result<ExitCode> {
    admin::stop(&served(dir, name)?.join(CONTROL), force, STOP_LIMIT)
        .with_context(|| format!("{name} does not stop"))?;
    Ok(ExitCode::SUCCESS)
}

/// `ublkup resize`
///
/// # Errors
///
/// When the export is not served, or keeps its size.
pub fn resize(
    dir: &RuntimeDir,
    name: &str,
    size_bytes: Option<u64>,
    shrink: bool,
    json: bool,
) -> Result<ExitCode> {
    let control = served(dir, name)?.join(CONTROL);
    let resized = admin::resize(&control, size_bytes, shrink, STOP_LIMIT)
        .with_context(|| format!("{name} keeps its size"))?;
    if json {
        print(&format!("{}\n", serde_json::to_string_pretty(&resized)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let (old, new) = (resized.old_size_bytes, resized.size_bytes);
    match old == new {
        true => print(&format!("{name}: {} as before\n", format_size(new)))?,
        false => print(&format!(
            "{name}: {}, was {}\n",
            format_size(new),
            format_size(old)
        ))?,
    }
    if resized.untold_clients > 0 {
        eprintln!(
            "ublkup: {name}: {} cannot be told of the new size, and will see it when connecting again",
            count(resized.untold_clients, "vhost-user client")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn served(dir: &RuntimeDir, name: &str) -> Result<std::path::PathBuf> {
    check_name(name)?;
    if !dir.is_alive(name) {
        bail!(
            "no export called '{name}' is served under {} (ublkup list shows what is)",
            dir.path().display()
        );
    }
    Ok(dir.folder(name))
}

fn table(exports: &[ExportStatus]) -> String {
    let mut rows = vec![
        [
            "NAME",
            "STATE",
            "ACCESS",
            "SIZE",
            "BLOCK DEVICE",
            "VHOST-USER-BLK",
            "PID",
        ]
        .map(str::to_owned),
    ];
    for export in exports {
        rows.push([
            export.name.clone(),
            export.state.clone(),
            export.access.to_string(),
            format_size(export.size_bytes),
            export
                .ublk
                .as_ref()
                .map_or("-".into(), |door| door.device.display().to_string()),
            export
                .vhost
                .as_ref()
                .map_or("-".into(), |door| door.socket.display().to_string()),
            export.pid.to_string(),
        ]);
    }
    let mut text = String::new();
    for row in &rows {
        for (column, cell) in row.iter().enumerate() {
            if column + 1 == row.len() {
                text.push_str(cell);
            } else {
                let width = rows.iter().map(|row| row[column].len()).max().unwrap_or(0) + 2;
                let _ = write!(text, "{cell:width$}");
            }
        }
        text.push('\n');
    }
    text
}

fn details(status: &ExportStatus) -> String {
    let mut text = format!(
        "{}: {}, access {}, {} of {} B blocks, {}{}, serial {}\n  backend   {}\n  server    pid {}\n  threads   poll-us {}{}",
        status.name,
        status.state,
        status.access,
        format_size(status.size_bytes),
        status.block_bytes,
        if status.read_only {
            "read-only"
        } else {
            "read-write"
        },
        if status.write_cache {
            ", write-back"
        } else {
            ", write-through"
        },
        status.serial,
        status.backend,
        status.pid,
        status.poll_us,
        (status.cpus.as_ref()).map_or(String::new(), |cpus| format!(", on processors {cpus}")),
    );
    if let Some(door) = &status.ublk {
        let _ = write!(
            text,
            "\n  ublk      {} ({} of {}{})\n            {}{}\n{}",
            door.device.display(),
            count(door.queues.into(), "queue"),
            door.depth,
            match door.data {
                DataPath::ZeroCopy => ", data without a copy",
                DataPath::UserCopy => ", data copied by the server",
                DataPath::Auto | DataPath::Copy => "",
            },
            door.features.join(", "),
            (door.affinity.as_ref()).map_or(String::new(), |queues| {
                format!("\n            on processors {}", queues.join(" | "))
            }),
            totals(&door.counters)
        );
    }
    if let Some(door) = &status.vhost {
        let _ = write!(
            text,
            "\n  vhost     {} ({}, {})\n{}",
            door.socket.display(),
            count(door.queues.into(), "queue"),
            count(door.threads.into(), "thread"),
            totals(&door.counters)
        );
        if !door.upgrade.is_empty() {
            let ways = door.upgrade.join(", ");
            let _ = write!(
                text,
                "\n            upgrade from the block device by: {ways}"
            );
        }
        for session in &door.sessions {
            let _ = write!(
                text,
                "\n            session of pid {}: {} running, for {} s",
                session.pid.map_or("?".into(), |pid| pid.to_string()),
                count(session.vrings, "queue"),
                session.age_seconds
            );
        }
    }
    text
}

fn totals(t: &Totals) -> String {
    format!(
        "            {} reads ({} B), {} writes ({} B), {} flushes, {} discards, {} write-zeroes, \
         {} errors",
        t.reads,
        t.read_bytes,
        t.writes,
        t.write_bytes,
        t.flushes,
        t.discards,
        t.write_zeroes,
        t.errors
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_show_closed_doors() {
        let mut one = ExportStatus {
            name: "a".into(),
            state: "serving".into(),
            access: crate::door::ownership::OwnershipState::Free,
            pid: 1,
            backend: "mem:1M".into(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            read_only: false,
            write_cache: false,
            serial: "a".into(),
            poll_us: "100".into(),
            cpus: Some("2,3".into()),
            ublk: None,
            vhost: None,
        };
        let mut two = one.clone();
        two.name = "a-long-name".into();
        one.vhost = Some(admin::VhostStatus {
            socket: "/run/x".into(),
            queues: 4,
            threads: 2,
            upgrade: vec!["kernel".into()],
            sessions: Vec::new(),
            counters: Totals::default(),
        });
        let text = table(&[one.clone(), two]);
        let columns: Vec<_> = text.lines().map(|line| line.find("serving")).collect();
        assert_eq!(columns[1], columns[2]);
        assert!(
            text.lines()
                .nth(1)
                .unwrap()
                .contains("1M    -             /run/x"),
            "{text}"
        );
        assert!(details(&one).contains("vhost     /run/x"));
        assert!(details(&one).contains("block device by: kernel"));
    }
}
