//! The steps of a snapshot, as the keeper has the daemon do them.
//!
//! QEMU opens files again by their names, so no file changes its name while the daemon has it open: the daemon flushes, takes no
//! more requests and ends; then the program that has asked for the snapshot renames, and a daemon is started with what is there.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::disk::{EXPORT, NEW_IMAGE, NODE, image_of, is_locked_for_merge};
use crate::engine::qmp::Qmp;
use crate::engine::wait::repeat_while;
use crate::engine::{SnapshotProgress, SnapshotStep};

/// The job that merges.
const MERGE: &str = "merge";

/// How long the daemon may take to answer the requests that it has, and to end a job.
const LIMIT: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);

/// What became of an order.
pub(super) enum Done {
    /// The daemon serves as before.
    Answer(Result<SnapshotProgress, String>),
    /// It has flushed all that it has answered, and takes no more requests.
    Flushed,
    /// It takes no more requests, and that is all that is known.
    Failed(String),
}

/// A daemon of which a step is asked.
pub(super) struct Snapshot<'a> {
    pub(super) monitor: &'a mut Qmp,
    pub(super) arguments: &'a [OsString],
}

impl Snapshot<'_> {
    pub(super) fn step(&mut self, step: SnapshotStep) -> Done {
        let begun = match step {
            SnapshotStep::Begin => self.begin(),
            SnapshotStep::Finish => self.finish(),
            SnapshotStep::Merge => return Done::Answer(self.merge()),
            SnapshotStep::Cancel => return Done::Answer(self.cancel()),
            SnapshotStep::Resume => {
                Err("requests are served: it took too long, or none was begun".into())
            }
        };
        match begun {
            Ok(Ok(())) => Done::Flushed,
            Ok(Err(why)) => Done::Failed(why),
            Err(why) => Done::Answer(Err(why)),
        }
    }

    /// Has all flushed. The outer error is that of a daemon that serves as before.
    fn begin(&mut self) -> Result<Result<(), String>, String> {
        let image = self.image()?;
        // The command follows links, too.
        let image = fs::canonicalize(&image).map_err(|error| format!("{image}: {error}"))?;
        let new = format!("{}{NEW_IMAGE}", image.display());
        if !Path::new(&new).is_file() {
            return Err(format!("{new} has to be there"));
        }
        if self.job()?.is_some() {
            return Err("the image is being merged: let that end, or cancel it".into());
        }
        let overlay = json!({
            "driver": "qcow2", "node-name": "new", "backing": null, "file": {"driver": "file", "filename": new},
        });
        self.command("blockdev-add", overlay)?;
        let nodes = self.command("query-named-block-nodes", json!({}))?;
        let size = |name: &str| {
            let nodes = nodes.as_array()?;
            let node = nodes.iter().find(|node| node["node-name"] == name)?;
            node["image"]["virtual-size"].as_u64()
        };
        if size("new").is_none_or(|new| Some(new) != size(NODE)) {
            self.command("blockdev-del", json!({"node-name": "new"}))?;
            return Err("the disk has got another size meanwhile: try again".into());
        }
        if let Err(why) = self.take_export() {
            return Ok(Err(why));
        }
        // It flushes the image, and fails if that fails.
        let switched = self.command("blockdev-snapshot", json!({"node": NODE, "overlay": "new"}));
        Ok(switched.map(drop))
    }

    fn image(&self) -> Result<String, &'static str> {
        image_of(self.arguments).ok_or("it is no qcow2 image in a file of its own")
    }

    fn merge(&mut self) -> Result<SnapshotProgress, String> {
        let job = match self.job()? {
            Some(job) => job,
            None => {
                self.begin_merge()?;
                self.job()?.ok_or("the job is gone")?
            }
        };
        if job["status"] == "concluded" {
            return Err(self.dismiss(&job).err().unwrap_or("it was merged".into()));
        }
        let bytes = |key: &str| job[key].as_u64().unwrap_or_default();
        Ok(SnapshotProgress {
            done_bytes: bytes("current-progress"),
            total_bytes: bytes("total-progress"),
            is_ready: job["status"] == "ready",
            failed: None,
        })
    }

    fn begin_merge(&mut self) -> Result<(), String> {
        let nodes = self.command("query-named-block-nodes", json!({}))?;
        let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
        let find = |key: &str, value: &Value| {
            nodes
                .iter()
                .find(|node| &node[key] == value && node["drv"] != "file")
        };
        let disk = find("node-name", &json!(NODE)).ok_or("it has no image")?;
        let backing = &disk["image"]["backing-image"]["filename"];
        let base = find("file", backing).ok_or("the image has no backing file")?;
        let path = backing.as_str().unwrap_or_default();
        // The server may be a guest's: what it cannot open it cannot lock, and not have written to.
        let image = self.image()?;
        if !is_locked_for_merge(Path::new(path), Path::new(&image)).unwrap_or(false) {
            return Err(format!(
                "that takes a lock on {path} (ublkup snapshot commit has it)"
            ));
        }
        let commit = json!({"job-id": MERGE, "device": NODE, "base-node": base["node-name"], "auto-dismiss": false});
        self.command("block-commit", commit).map(drop)
    }

    fn finish(&mut self) -> Result<Result<(), String>, String> {
        let is_ready = (self.job()?).is_some_and(|job| job["status"] == "ready");
        if !is_ready {
            return Err("not all is merged yet".into());
        }
        let finished = self.take_export().and_then(|()| {
            // It flushes the backing file, and fails if that fails.
            self.command("job-complete", json!({"id": MERGE}))?;
            self.end_job()
        });
        Ok(finished)
    }

    fn cancel(&mut self) -> Result<SnapshotProgress, String> {
        if self.job()?.is_some() {
            self.command("block-job-cancel", json!({"device": MERGE, "force": true}))?;
            let _ = self.end_job();
        }
        Ok(SnapshotProgress::default())
    }

    /// Has the daemon answer the requests that it has, and take no more.
    fn take_export(&mut self) -> Result<(), String> {
        self.command("block-export-del", json!({"id": EXPORT, "mode": "hard"}))?;
        let exports = || self.command("query-block-exports", json!({}));
        let left = repeat_while(LIMIT, INTERVAL, exports, |exports| {
            exports.as_ref().is_ok_and(|exports| exports != &json!([]))
        })?;
        match left == json!([]) {
            true => Ok(()),
            false => Err("it does not answer the requests that it has".into()),
        }
    }

    fn job(&mut self) -> Result<Option<Value>, String> {
        let jobs = self.command("query-jobs", json!({}))?;
        let jobs = jobs.as_array().map_or(&[][..], Vec::as_slice);
        Ok(jobs.iter().find(|job| job["id"] == MERGE).cloned())
    }

    /// Waits for the end of the job.
    fn end_job(&mut self) -> Result<(), String> {
        let job = || self.job();
        let job = repeat_while(
            LIMIT,
            INTERVAL,
            job,
            |job| matches!(job, Ok(Some(job)) if job["status"] != "concluded"),
        )?;
        let job = job.ok_or("the job is gone")?;
        match job["status"] == "concluded" {
            true => self.dismiss(&job),
            false => Err("the job does not end".into()),
        }
    }

    /// Forgets a job that has ended. Its error, if it has failed.
    fn dismiss(&mut self, job: &Value) -> Result<(), String> {
        self.command("job-dismiss", json!({"id": MERGE}))?;
        job["error"]
            .as_str()
            .map_or(Ok(()), |error| Err(error.to_owned()))
    }

    fn command(&mut self, name: &'static str, arguments: Value) -> Result<Value, String> {
        let done = self.monitor.command(name, arguments);
        done.map_err(|error| format!("{error:#}"))
    }
}
