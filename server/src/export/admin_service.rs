//! What an export answers at its admin socket.

use std::collections::BTreeMap;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::admin::{
    self, ExportStatus, OPEN_INTERVAL, OPEN_LIMIT, RefusalStatus, Resized, SessionStatus,
    UblkStatus, VhostStatus,
};
use super::event::Event;
use super::shared::{Shared, State};
use super::upgrade::UpgradeListener;
use crate::config::StorageSpec;
use crate::door::ownership::KeptFor;
use crate::door::ublk::UblkDoor;
use crate::door::vhost::{Refusal, SessionInfo};
use crate::engine::counters::CounterSet;
use crate::engine::events::{self, What};
use crate::engine::throttle::RateLimits;
use crate::engine::wait::repeat_while;
use crate::engine::{SnapshotProgress, SnapshotStep};
use crate::engine::{log, sandbox};
use crate::request::MAX_DISK_BYTES;
use crate::request::format_size;

impl Shared {
    /// Whether another server could take this export over.
    pub(super) fn may_leave(&self) -> Result<()> {
        if let StorageSpec::Memory { .. } = self.config.storage {
            bail!("what is in memory goes with its server");
        }
        if let Some((door, _)) = &self.doors().ublk
            && !door.can_be_left()
        {
            bail!(
                "{} goes with its server (--ublk-recovery, and a kernel with user recovery, would \
                 keep it)",
                door.block_path().display()
            );
        }
        Ok(())
    }

    /// Takes the disk away from programs that might begin to use it. One that only has the block device open is
    /// waited for: udev opens each new disk for a moment, and again when a program that wrote closes it.
    ///
    /// # Errors
    ///
    /// Names the program that uses it already.
    fn close_if_unused(&self, openers: Option<&str>) -> Result<()> {
        let is_open = |closed: &Result<Option<String>>| matches!(closed, Ok(Some(_)));
        // Where the client sees a process it has waited already.
        let limit = match openers {
            Some(seen) if !seen.is_empty() => Duration::ZERO,
            _ => OPEN_LIMIT,
        };
        let close = || self.close_unless_open(openers);
        match repeat_while(limit, OPEN_INTERVAL, close, is_open)? {
            Some(user) => bail!("{user}"),
            None => Ok(()),
        }
    }

    /// As [`close_if_unused`](Self::close_if_unused), without waiting. Returns who has the block device open, if that
    /// is all that is in the way.
    fn close_unless_open(&self, openers: Option<&str>) -> Result<Option<String>> {
        const FORCE: &str = "stop --force stops it all the same";
        if let Some(KeptFor { client, seconds }) = self.access.kept_for() {
            bail!("in use: the disk is kept for {client} for {seconds} s more ({FORCE})");
        }
        if let Some(holder) = self.access.holder() {
            bail!("in use: {holder} has the disk ({FORCE})");
        }
        if let Some((door, _)) = &self.doors().vhost {
            let running = door.sessions().into_iter().find(|client| client.vrings > 0);
            if let Some(client) = running {
                let pid = client.peer_pid.map_or("?".into(), |pid| pid.to_string());
                bail!("in use: the vhost-user client of process {pid} has the disk ({FORCE})");
            }
        }
        let may_be_open = openers != Some("");
        if let Some(door) = self.ublk()
            && !door.close_unless_open(may_be_open)?
        {
            let device = door.block_path();
            let device = device.display();
            if let Some(user) = door.writes().in_use() {
                bail!("in use: {device} is open: {user} ({FORCE})");
            }
            let user = door
                .user()
                .or(openers.filter(|seen| !seen.is_empty()).map(str::to_owned))
                .unwrap_or("a process that this server cannot see".into());
            return Ok(Some(format!("in use: {device} is open: {user} ({FORCE})")));
        }
        Ok(None)
    }

    /// Changes options, or none of them.
    fn change(&self, options: BTreeMap<String, String>) -> Result<()> {
        let mut live = self.live();
        let live = live.as_mut().context("it is being stopped")?;
        let changed = live.config.change(options.clone())?;
        // First, so that what is in force is what the next server reads.
        let served = serde_json::to_string(&changed.saved)?;
        (live.note.replace(&served, || {})).context("cannot note it in the runtime directory")?;
        self.throttle.set(changed.live.limits());
        self.access.set_grace(changed.live.reconnect_grace());
        self.config.threads.polling.set(changed.live.polling());
        live.config = changed;
        for (key, value) in options {
            tracing::info!("{}: {key}={value}", self.config.name);
            events::tell(&self.config.name, What::Changed { key, value });
        }
        Ok(())
    }

    /// Gives the disk its size back: the storage keeps what was to be cut off.
    fn undo_shrinking(&self, old_size_bytes: u64) {
        self.limits.capacity.set(old_size_bytes);
        if let Some(door) = self.ublk()
            && let Err(error) = door.resize(old_size_bytes)
        {
            tracing::error!("{}: {error}", self.config.name);
        }
        if let Some((door, _)) = &self.doors().vhost {
            // A client that cannot be told sees it when it connects anew.
            let _ = door.tell_new_size();
        }
    }

    /// Whether something may be cut off the disk.
    fn may_shrink(&self, less_bytes: u64, wanted: bool) -> Result<()> {
        if !wanted {
            bail!(
                "{} would be cut off: say --shrink if that is what you want",
                format_size(less_bytes)
            );
        }
        let has_clients =
            (self.doors().vhost.as_ref()).is_some_and(|(door, _)| !door.sessions().is_empty());
        if has_clients {
            bail!("a vhost-user client has the disk, which can only grow then");
        }
        if let Some(door) = self.ublk()
            && let Some(user) = door.writes().in_use()
        {
            bail!("the block device is in use ({user}), and can only grow then");
        }
        Ok(())
    }

    /// Makes the disk as large as its storage, which another program may have changed.
    pub(super) fn follow_growth(&self) -> Result<()> {
        let one = self.resizing();
        let Some(storage) = self.storage().clone() else {
            return Ok(());
        };
        let (have_bytes, disk_bytes) = (storage.grow(None)?, self.limits.capacity.bytes());
        if have_bytes > disk_bytes {
            self.resize_alone(&one, None, false)?;
        }
        ensure!(
            have_bytes >= disk_bytes,
            "another program has made the storage smaller, {}: what was behind is lost",
            format_size(have_bytes)
        );
        Ok(())
    }

    fn resizing(&self) -> MutexGuard<'_, ()> {
        // The size is set after all else.
        self.resizing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn resize_alone(
        &self,
        _one: &MutexGuard<'_, ()>,
        size_bytes: Option<u64>,
        shrink: bool,
    ) -> Result<Resized> {
        let (name, capacity) = (&self.config.name, &self.limits.capacity);
        let old_size_bytes = capacity.bytes();
        let block_bytes = u64::from(self.limits.block_bytes);
        if let Some(wanted) = size_bytes
            && (wanted == 0 || !wanted.is_multiple_of(block_bytes) || wanted > MAX_DISK_BYTES)
        {
            bail!(
                "{wanted} is no size for a disk with blocks of {block_bytes}, or too large (at most {})",
                format_size(MAX_DISK_BYTES)
            );
        }
        let storage = (self.storage().clone()).context("it is being stopped")?;
        let have_bytes = storage.grow(size_bytes)?;
        let size_bytes = size_bytes.unwrap_or(have_bytes).min(have_bytes);
        if size_bytes == 0 {
            bail!("nothing would be left of it");
        }
        if size_bytes < old_size_bytes {
            self.may_shrink(old_size_bytes - size_bytes, shrink)?;
        } else {
            // What the clients are about to be told is true already.
            capacity.set(size_bytes);
        }
        if size_bytes != old_size_bytes
            && let Some(door) = self.ublk()
            && let Err(error) = door.resize(size_bytes)
        {
            capacity.set(old_size_bytes);
            return Err(error.into());
        }
        capacity.set(size_bytes);
        let untold_clients = match &self.doors().vhost {
            Some((door, _)) if size_bytes != old_size_bytes => door.tell_new_size(),
            _ => 0,
        };
        if size_bytes < old_size_bytes
            && let Err(error) = storage.cut(size_bytes)
        {
            self.undo_shrinking(old_size_bytes);
            return Err(error.into());
        }
        tracing::info!(
            "{name}: {}, was {}",
            format_size(size_bytes),
            format_size(old_size_bytes)
        );
        if size_bytes != old_size_bytes {
            let what = What::Resized {
                size_bytes,
                old_size_bytes,
            };
            events::tell(name, what);
        }
        Ok(Resized {
            size_bytes,
            old_size_bytes,
            untold_clients,
        })
    }
}

impl admin::Service for Shared {
    fn name(&self) -> &str {
        &self.config.name
    }

    fn status(&self) -> ExportStatus {
        let doors = self.doors();
        let (config, limits) = (&self.config, &self.limits);
        ExportStatus {
            schema: admin::SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            server: self.server.clone(),
            started_unix_seconds: self.started_unix_seconds,
            name: config.name.clone(),
            state: match doors.state {
                State::Serving => "serving",
                State::Stopping | State::Stopped | State::Left => "stopping",
            }
            .into(),
            access: self.access.state(),
            kept_for: self.access.kept_for(),
            pid: std::process::id(),
            backend: config.storage_text(),
            size_bytes: limits.capacity.bytes(),
            block_bytes: limits.block_bytes,
            read_only: limits.read_only,
            write_cache: limits.write_cache,
            serial: limits.serial.as_str().to_owned(),
            poll_us: config.threads.polling.get().to_string(),
            cpus: config.threads.cpus.as_ref().map(ToString::to_string),
            limits: Some(self.throttle.limits()).filter(RateLimits::are_set),
            sandbox: sandbox::status(),
            last_error: self
                .storage()
                .as_ref()
                .and_then(|storage| storage.last_error()),
            lost_log_lines: log::lost_lines(),
            ublk: (doors.ublk.as_ref()).map(|(door, registry)| ublk_status(door, registry)),
            vhost: doors.vhost.as_ref().map(|(door, registry)| VhostStatus {
                socket: door.path().to_owned(),
                queues: config.queues,
                threads: config.vhost_threads,
                upgrade: doors
                    .upgrade
                    .iter()
                    .flat_map(UpgradeListener::ways)
                    .map(str::to_owned)
                    .collect(),
                refused: door.last_refusal().map(refusal_status),
                sessions: door.sessions().iter().map(session_status).collect(),
                in_flight: registry.in_flight(),
                counters: registry.totals(),
                latency: registry.latencies(),
            }),
        }
    }

    fn resize(&self, size_bytes: Option<u64>, shrink: bool) -> Result<Resized> {
        let one = self.resizing();
        self.resize_alone(&one, size_bytes, shrink)
    }

    fn snapshot(&self, step: SnapshotStep) -> Result<SnapshotProgress> {
        let _one = self.resizing();
        let storage = (self.storage().clone()).context("it is being stopped")?;
        ensure!(!self.limits.read_only, "it is served without writes");
        let done = storage.snapshot(step)?;
        if step != SnapshotStep::Merge {
            tracing::info!("{}: snapshot: {}", self.config.name, step.past());
        }
        Ok(done)
    }

    fn set(&self, mut options: BTreeMap<String, String>) -> Result<()> {
        let log = options.remove("log");
        if let Some(filter) = &log {
            ensure!(
                self.may_set_log,
                "log is the whole server's: the users of the admin socket of {} may not change it, because other \
                 exports have other users",
                self.config.name
            );
            log::check_filter(filter).map_err(|why| anyhow!("log: {why}"))?;
        }
        if !options.is_empty() {
            self.change(options)?;
        }
        if let Some(filter) = log {
            log::set_filter(&filter).map_err(|why| anyhow!("log: {why}"))?;
            tracing::info!("{}: log={filter}, for the whole server", self.config.name);
        }
        Ok(())
    }

    fn stop(&self, force: bool, openers: Option<String>) -> Result<()> {
        if !force {
            self.close_if_unused(openers.as_deref())?;
        }
        let export = self.number;
        // The receiver is gone when the server is ending, and then the export stops anyway.
        let _ = self.events.send(Event::Stop { export });
        match self.await_end() {
            State::Left => bail!("it has just been left to another server: stop it there"),
            _ => Ok(()),
        }
    }

    fn leave(&self) -> Result<()> {
        if self.doors().state != State::Serving {
            bail!("it is being stopped");
        }
        self.may_leave()?;
        let export = self.number;
        // As above.
        let _ = self.events.send(Event::Leave { export });
        // If another command has stopped it the name is free as well.
        self.await_end();
        Ok(())
    }
}

fn ublk_status(door: &UblkDoor, registry: &CounterSet) -> UblkStatus {
    let facts = door.facts();
    let affinity = facts.affinity.as_ref();
    UblkStatus {
        device: door.block_path(),
        queues: facts.queues,
        depth: facts.depth,
        data: facts.data,
        features: facts.features.names(),
        affinity: affinity.map(|queues| queues.iter().map(ToString::to_string).collect()),
        in_flight: registry.in_flight(),
        counters: registry.totals(),
        latency: registry.latencies(),
    }
}

fn refusal_status(refusal: Refusal) -> RefusalStatus {
    RefusalStatus {
        pid: refusal.peer_pid,
        why: refusal.why,
        age_seconds: refusal.at.elapsed().unwrap_or_default().as_secs(),
    }
}

fn session_status(info: &SessionInfo) -> SessionStatus {
    SessionStatus {
        pid: info.peer_pid,
        state: info.state,
        vrings: info.vrings,
        age_seconds: info.since.elapsed().unwrap_or_default().as_secs(),
    }
}
