//! The commands that talk to servers: `list`, `stat`, `resize`, `stop`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use upgrade_proto::{connect_within, printable, remove_stale_entries};

use super::left;
use super::output::{complain, count, print, print_json, print_json_text, print_line};
use super::rates::{changes, time};
use crate::config::check_name;
use crate::door::ownership::KeptFor;
use crate::door::ublk::DataPath;
use crate::engine::counters::Totals;
use crate::engine::socket::peer_pid;
use crate::export::admin::{self, ExportStatus};
use crate::export::explain;
use crate::export::name_lock::CONTROL;
use crate::export::runtime_dir::RuntimeDir;
use crate::request::format_size;

/// A server that does not answer within this time is reported as not answering.
const STAT_LIMIT: Duration = Duration::from_secs(5);

/// Draining ends when the storage has completed its requests, which may take long.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// The columns of `ublkup list`.
const HEAD: [&str; 7] = [
    "NAME",
    "STATE",
    "ACCESS",
    "SIZE",
    "BLOCK DEVICE",
    "VHOST-USER-BLK",
    "PID",
];

/// `ublkup list`
///
/// # Errors
///
/// When the runtime directory cannot be read.
pub fn list(dir: &RuntimeDir, json: bool) -> Result<ExitCode> {
    let Found { exports, silent } = statuses(dir)?;
    for Silent { name, why, .. } in &silent {
        complain(&format!("{name}: {why}"));
    }
    if json {
        let mut listed: Vec<_> = exports
            .iter()
            .map(serde_json::to_value)
            .collect::<Result<_, _>>()?;
        let dead = silent.iter().filter(|silent| silent.is_dead);
        listed.extend(dead.map(|silent| serde_json::json!({"name": silent.name, "state": "dead"})));
        print_json(&listed)?;
    } else {
        print(&table(&exports))?;
    }
    Ok(match silent.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// What the exports of this machine say about themselves.
pub(super) struct Found {
    pub exports: Vec<ExportStatus>,
    pub silent: Vec<Silent>,
}

/// An export that has no server, or one that does not answer.
pub(super) struct Silent {
    pub name: String,
    pub why: String,
    pub is_dead: bool,
}

/// Asks the server of each export.
pub(super) fn statuses(dir: &RuntimeDir) -> Result<Found> {
    let mut found = Found {
        exports: Vec::new(),
        silent: Vec::new(),
    };
    for name in dir.names()? {
        let folder = dir.folder(&name);
        let (why, is_dead) = match dir.is_alive(&name) {
            Ok(true) => match admin::stat(&folder.join(CONTROL), STAT_LIMIT) {
                Ok(status) => {
                    found.exports.push(status);
                    continue;
                }
                Err(error) => (explain(&error), false),
            },
            Ok(false) => {
                let advice = left::advice(dir, &name);
                (format!("its server has died; {advice}"), true)
            }
            // A user whom the admin socket admits need not be one who may lock the name.
            Err(error) if error.errno() == Errno::ACCESS => {
                match admin::stat(&folder.join(CONTROL), STAT_LIMIT) {
                    Ok(status) => {
                        found.exports.push(status);
                        continue;
                    }
                    Err(_) => (explain(&unknown(error, &folder)), false),
                }
            }
            Err(error) => (explain(&unknown(error, &folder)), false),
        };
        found.silent.push(Silent { name, why, is_dead });
    }
    Ok(found)
}

/// `ublkup stat`
///
/// # Errors
///
/// When the export is not served or does not answer.
pub fn stat(dir: &RuntimeDir, name: &str, json: bool, watch: bool) -> Result<ExitCode> {
    let mut before: Option<(Instant, ExportStatus)> = None;
    loop {
        let status = admin::stat(&served(dir, name)?, STAT_LIMIT)
            .with_context(|| format!("{name} does not answer"))?;
        let now = Instant::now();
        match (json, &before) {
            // One line each: a program reads them as they come.
            (true, _) if watch => print_json_text(&serde_json::to_string(&status)?)?,
            (true, _) => print_json(&status)?,
            (false, None) => print(&details(&status))?,
            (false, Some((at, earlier))) => print(&changes(earlier, &status, now - *at))?,
        }
        if !watch {
            return Ok(ExitCode::SUCCESS);
        }
        before = Some((now, status));
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// `ublkup stop`
///
/// # Errors
///
/// When the export is not served, or in use, or does not end.
pub fn stop(dir: &RuntimeDir, name: &str, force: bool) -> Result<ExitCode> {
    check_name(name)?;
    if force && matches!(dir.is_alive(name), Ok(false)) && dir.folder(name).exists() {
        print_line(&format!("{name}: {}", left::remove(dir, name)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let control = served(dir, name)?;
    // One that does not answer at all is not worth the long wait.
    let status = admin::stat(&control, STAT_LIMIT).with_context(|| does_not_answer(&control))?;
    let tell = || {
        complain(&format!(
            "{name} still waits for requests, its server's log says for which; waiting up to {} s (two SIGTERM to \
             process {} end it at once, as a crash would)",
            STOP_LIMIT.as_secs(),
            status.pid
        ));
    };
    stop_export(dir, name, force, tell).with_context(|| format!("{name} does not stop"))?;
    Ok(ExitCode::SUCCESS)
}

/// Has an export stopped, and removes what a confined server cannot: the entry in the registry that was made for it while it
/// ran.
///
/// # Errors
///
/// When the server refuses, or does not answer.
pub(super) fn stop_export(
    dir: &RuntimeDir,
    name: &str,
    force: bool,
    on_delay: impl FnOnce(),
) -> Result<()> {
    admin::stop(&dir.folder(name).join(CONTROL), force, STOP_LIMIT, on_delay)?;
    // What stays of it is passed over by clients, and removed by the next server.
    let _ = remove_stale_entries(dir.path());
    Ok(())
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
    let control = served(dir, name)?;
    let resized = admin::resize(&control, size_bytes, shrink, STOP_LIMIT)
        .with_context(|| format!("{name} keeps its size"))?;
    if json {
        print_json(&resized)?;
        return Ok(ExitCode::SUCCESS);
    }
    let [old, new] = [resized.old_size_bytes, resized.size_bytes].map(format_size);
    print_line(&match old == new {
        true => format!("{name}: {new} as before"),
        false => format!("{name}: {new}, was {old}"),
    })?;
    if resized.untold_clients > 0 {
        complain(&format!(
            "{name}: {} cannot be told of the new size, and will see it when connecting again",
            count(resized.untold_clients, "vhost-user client")
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// `ublkup set`
///
/// # Errors
///
/// When the export is not served, or an option cannot be changed.
pub fn set(dir: &RuntimeDir, name: &str, options: &[(String, String)]) -> Result<ExitCode> {
    let control = served(dir, name)?;
    admin::set(&control, options.iter().cloned().collect(), STAT_LIMIT)
        .with_context(|| format!("{name} stays as it is"))?;
    Ok(ExitCode::SUCCESS)
}

/// The admin socket of an export.
pub(super) fn served(dir: &RuntimeDir, name: &str) -> Result<PathBuf> {
    check_name(name)?;
    let folder = dir.folder(name);
    let control = folder.join(CONTROL);
    let alive = match dir.is_alive(name) {
        Ok(alive) => alive,
        // A user whom the admin socket admits need not be one who may lock the name.
        Err(error)
            if error.errno() == Errno::ACCESS && connect_within(&control, STAT_LIMIT).is_ok() =>
        {
            true
        }
        Err(error) => return Err(unknown(error, &folder)),
    };
    if !alive && folder.exists() {
        bail!(
            "the server of '{name}' has died; {}",
            left::advice(dir, name)
        );
    }
    if !alive {
        bail!(
            "no export called '{name}' is served under {} (ublkup list shows what is)",
            dir.path().display()
        );
    }
    Ok(control)
}

fn does_not_answer(control: &Path) -> String {
    let pid = connect_within(control, STAT_LIMIT).map(|stream| peer_pid(&stream));
    let process = match pid {
        Ok(Some(pid)) => format!("its server, process {pid},"),
        _ => "its server".to_owned(),
    };
    format!("{process} does not answer: end it with SIGTERM, twice if it does not end, or SIGKILL")
}

/// Why it is not known whether a folder has a server.
fn unknown(error: upgrade_proto::Error, folder: &Path) -> anyhow::Error {
    let whose = match error.errno() {
        Errno::ACCESS => ": it is another user's",
        _ => "",
    };
    let folder = folder.display();
    anyhow::Error::from(error).context(format!("cannot know whether {folder} has a server{whose}"))
}

fn table(exports: &[ExportStatus]) -> String {
    let path = |path: Option<&PathBuf>| path.map_or("-".into(), |path| path.display().to_string());
    let row = |export: &ExportStatus| {
        [
            export.name.clone(),
            export.state.clone(),
            export.access.to_string(),
            format_size(export.size_bytes),
            path(export.ublk.as_ref().map(|door| &door.device)),
            path(export.vhost.as_ref().map(|door| &door.socket)),
            export.pid.to_string(),
        ]
    };
    let mut rows = vec![HEAD.map(str::to_owned)];
    // Another program may have answered as the server.
    let rows_of_exports = exports.iter().map(row);
    rows.extend(rows_of_exports.map(|row| row.map(|cell| printable(&cell))));
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; HEAD.len()] = std::array::from_fn(width);
    let line = |row: &[String; HEAD.len()]| {
        let cells = row.iter().zip(widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

fn details(status: &ExportStatus) -> String {
    let access = if status.read_only {
        "read-only"
    } else {
        "read-write"
    };
    let cache = if status.write_cache {
        "write-back"
    } else {
        "write-through"
    };
    let cpus = status
        .cpus
        .as_ref()
        .map(|cpus| format!(", on processors {cpus}"));
    let mut lines = vec![
        format!(
            "{}: {}, access {}, {} of {} B blocks, {access}, {cache}, serial {}",
            status.name,
            status.state,
            status.access,
            format_size(status.size_bytes),
            status.block_bytes,
            status.serial,
        ),
        format!("  storage   {}", status.backend),
        format!("  server    {}pid {}", server_name(status), status.pid),
        format!(
            "  threads   poll-us {}{}",
            status.poll_us,
            cpus.unwrap_or_default()
        ),
    ];
    if let Some(limits) = &status.limits {
        lines.push(format!("  limits    {limits}"));
    }
    lines.push(format!("  sandbox   {}", status.sandbox));
    if let Some(kept) = &status.kept_for {
        let KeptFor { client, seconds } = kept;
        lines.push(format!("  kept      for {client}, {seconds} s more"));
    }
    if let Some(error) = &status.last_error {
        lines.push(format!("  error     {error}"));
    }
    if status.lost_log_lines > 0 {
        let lost = count(status.lost_log_lines, "line");
        lines.push(format!("  log       {lost} could not be written"));
    }
    if let Some(door) = &status.ublk {
        let data = match door.data {
            DataPath::ZeroCopy => ", data without a copy",
            DataPath::UserCopy => ", data copied by the server",
            DataPath::Auto | DataPath::Copy => "",
        };
        let (device, depth) = (door.device.display(), door.depth);
        let queues = count(door.queues.into(), "queue");
        lines.push(format!("  ublk      {device} ({queues} of {depth}{data})"));
        lines.push(format!("            {}", door.features.join(", ")));
        if let Some(queues) = &door.affinity {
            lines.push(format!("            on processors {}", queues.join(" | ")));
        }
        lines.push(totals(&door.counters));
    }
    if let Some(door) = &status.vhost {
        let queues = count(door.queues.into(), "queue");
        let threads = count(door.threads.into(), "thread");
        let socket = door.socket.display();
        lines.push(format!("  vhost     {socket} ({queues}, {threads})"));
        lines.push(totals(&door.counters));
        if !door.upgrade.is_empty() {
            let routes = door.upgrade.join(", ");
            lines.push(format!(
                "            upgrade from the block device by: {routes}"
            ));
        }
        if let Some(refused) = &door.refused {
            let pid = refused.pid.map_or("?".into(), |pid| pid.to_string());
            let (why, age) = (&refused.why, refused.age_seconds);
            lines.push(format!("            refused pid {pid} {age} s ago: {why}"));
        }
        for session in &door.sessions {
            let pid = session.pid.map_or("?".into(), |pid| pid.to_string());
            let queues = count(session.vrings, "queue");
            let age = session.age_seconds;
            lines.push(format!(
                "            session of pid {pid}: {queues} running, for {age} s"
            ));
        }
    }
    // Another program may have answered as the server.
    let lines = lines.iter().map(|line| printable(line) + "\n");
    lines.collect()
}

/// The name of the server, if it was given one.
fn server_name(status: &ExportStatus) -> String {
    match &status.server {
        name if name.is_empty() || *name == status.pid.to_string() => String::new(),
        name => format!("{name}, "),
    }
}

fn totals(t: &Totals) -> String {
    format!(
        "            {} reads ({} B), {} writes ({} B), {} flushes, {} discards, {} write-zeroes, \
         {} errors{}",
        t.reads,
        t.read_bytes,
        t.writes,
        t.write_bytes,
        t.flushes,
        t.discards,
        t.write_zeroes,
        t.errors,
        match t.throttled {
            0 => String::new(),
            held => format!(", {held} held back for {}", time(Some(t.throttled_ns))),
        }
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_show_closed_doors() {
        let mut one = ExportStatus {
            schema: admin::SCHEMA,
            version: "1".into(),
            server: "s".into(),
            started_unix_seconds: 7,
            name: "a".into(),
            state: "serving".into(),
            access: crate::door::ownership::OwnershipState::Free,
            kept_for: None,
            pid: 1,
            backend: "mem:1M".into(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            read_only: false,
            write_cache: false,
            serial: "a".into(),
            poll_us: "100".into(),
            limits: None,
            sandbox: crate::engine::sandbox::Status::default(),
            last_error: None,
            lost_log_lines: 0,
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
            refused: None,
            sessions: Vec::new(),
            in_flight: 0,
            counters: Totals::default(),
            latency: Vec::new(),
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

    #[test]
    fn what_a_server_answers_has_no_effect_on_the_terminal() {
        let status = ExportStatus {
            schema: admin::SCHEMA,
            version: "1".into(),
            server: "s".into(),
            started_unix_seconds: 7,
            name: "a\u{1b}[2J".into(),
            state: "serving\nb: serving".into(),
            access: crate::door::ownership::OwnershipState::Free,
            kept_for: Some(KeptFor {
                client: "one\nof many".into(),
                seconds: 1,
            }),
            pid: 1,
            backend: "mem:1M\r".into(),
            size_bytes: 1 << 20,
            block_bytes: 512,
            read_only: false,
            write_cache: false,
            serial: "\u{9b}2J".into(),
            poll_us: "100".into(),
            limits: None,
            sandbox: crate::engine::sandbox::Status {
                on: true,
                missing: vec!["nothing\nbut \u{1b}[2J".into()],
            },
            last_error: Some("none\nas you see".into()),
            lost_log_lines: 0,
            cpus: None,
            ublk: None,
            vhost: None,
        };
        for (text, lines) in [
            (table(std::slice::from_ref(&status)), 2),
            (details(&status), 7),
        ] {
            assert_eq!(text.lines().count(), lines, "{text}");
            assert!(
                !text
                    .chars()
                    .any(|letter| letter.is_control() && letter != '\n'),
                "{text}"
            );
        }
    }
}
