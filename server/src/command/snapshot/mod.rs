//! `ublkup snapshot`: the part of snapshots that files are renamed for.
//!
//! An export keeps the path of its image. A snapshot is the file that was there, under another name, and an empty image over it
//! takes its place; a commit does the reverse. Whenever the machine dies, what is at the path is the whole disk: the empty image
//! shows what the one below has, and one that was merged holds the same as the one that was merged into.
//!
//! | file          | tells                                |
//! |---------------|--------------------------------------|
//! | `image.rs`    | which file is the image of an export |
//! | `qemu_img.rs` | images are made, read and copied     |

mod image;
mod qemu_img;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::cli::{BackupFormat, Snapshot};
use super::client::served;
use super::output::{complain, print, print_json_text, print_line};
use super::qemu::quote;
use crate::engine::{SnapshotProgress, SnapshotStep};
use crate::export::admin;
use crate::export::runtime_dir::RuntimeDir;
use crate::request::format_size;
use crate::storage::{HELD_LIMIT, NEW_IMAGE, lock_qemu_image};
use image::image;

/// How long a step may take: the server limits what its daemon does.
const STEP_LIMIT: Duration = Duration::from_secs(130);

/// How often it is looked how much is merged.
const MERGE_INTERVAL: Duration = Duration::from_millis(200);

/// What follows the name of an image in that of the snapshot that a backup is made of.
const BACKUP: &str = ".ublkup-backup";

/// What follows it in that of one that was merged, until nothing uses it.
const OLD: &str = ".ublkup-old";

/// Runs one of the commands.
///
/// # Errors
///
/// When it cannot be done, with what has become of the disk if that is not what it was.
pub fn run(dir: &RuntimeDir, asked: &Snapshot) -> Result<ExitCode> {
    let disk = |name: &str| Disk::find(dir, name);
    match asked {
        Snapshot::Create { name, file } => {
            disk(name)?.create(&absolute(file)?)?;
            print_line(&format!("{name}: {} is what it holds now", file.display()))?;
        }
        Snapshot::Commit { name, file } => {
            disk(name)?.commit(file)?;
            print_line(&format!("{name}: {} is merged", file.display()))?;
        }
        Snapshot::Cancel { name } => {
            disk(name)?.step(SnapshotStep::Cancel)?;
        }
        Snapshot::Backup { name, file, format } => {
            disk(name)?.back_up(&absolute(file)?, *format)?;
            print_line(&format!("{name}: {} is its backup", file.display()))?;
        }
        Snapshot::List { name, json } => {
            let image = disk(name)?.image;
            let text = qemu_img::info_text(&image, true)?;
            match json {
                true => print_json_text(&text)?,
                false => print(&table(&serde_json::from_str::<Vec<_>>(&text)?))?,
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The image and what it lies over.
fn table(chain: &[qemu_img::Info]) -> String {
    let row = |one: &qemu_img::Info| {
        let [size, stored] = [one.virtual_size, one.actual_size].map(format_size);
        let (format, file) = (&one.format, one.filename.display());
        format!("{format:<8} {size:>12} {stored:>12}  {file}\n")
    };
    let rows = chain.iter().map(row);
    format!("{:<8} {:>12} {:>12}  FILE\n", "FORMAT", "SIZE", "STORED") + &rows.collect::<String>()
}

/// An export of a qcow2 image.
struct Disk {
    name: String,
    control: PathBuf,
    image: PathBuf,
}

impl Disk {
    fn find(dir: &RuntimeDir, name: &str) -> Result<Self> {
        let control = served(dir, name)?;
        let image = image(name, &control, &dir.folder(name))?;
        Ok(Self {
            name: name.to_owned(),
            control,
            image,
        })
    }

    fn step(&self, step: SnapshotStep) -> Result<SnapshotProgress> {
        admin::snapshot(&self.control, step, None, STEP_LIMIT)
    }

    /// Puts an empty image over the one that is there, which is `snapshot` from then on.
    fn create(&self, snapshot: &Path) -> Result<()> {
        let image = &self.image;
        ensure!(
            fs::symlink_metadata(snapshot).is_err(),
            "{} is there already",
            snapshot.display()
        );
        self.check_file_system(parent(snapshot)?)?;
        let new = self.beside(NEW_IMAGE);
        // Of a command that was killed.
        remove(&new)?;
        let made = self
            .make(&new, snapshot)
            .and_then(|()| self.step(SnapshotStep::Begin));
        if let Err(error) = made {
            let _ = remove(&new);
            return Err(error);
        }
        let begun = Instant::now();
        if let Err(error) = self.put_over(&new, snapshot, begun) {
            let _ = remove(&new);
            let _ = self.step(SnapshotStep::Resume);
            return Err(error.context(format!("{} is as before", self.name)));
        }
        let resumed = self.step(SnapshotStep::Resume).with_context(|| {
            format!(
                "{} lies over {}, and is not served",
                image.display(),
                snapshot.display()
            )
        })?;
        let Some(why) = resumed.failed else {
            return Ok(());
        };
        // Requests still wait, and what is there shows what the snapshot has.
        let taken_back = in_time(begun).and_then(|()| {
            let _lock = lock(image)?;
            fs::rename(snapshot, image)?;
            Ok(sync_folders(&[image, snapshot])?)
        });
        let _ = self.step(SnapshotStep::Resume);
        taken_back
            .with_context(|| format!("{} lies over {}", image.display(), snapshot.display()))?;
        bail!(
            "{} is as before: the new image cannot be served: {why}",
            self.name
        )
    }

    /// Gives the image the name of the snapshot, and its own to the new one. On an error nothing has changed.
    fn put_over(&self, new: &Path, snapshot: &Path, begun: Instant) -> Result<()> {
        let _lock = lock(&self.image)?;
        fs::hard_link(&self.image, snapshot).with_context(|| snapshot.display().to_string())?;
        let files = [&*self.image, snapshot];
        // QEMU has had it open.
        let synced = File::open(new).and_then(|new| new.sync_all());
        let renamed = synced.map_err(Into::into).and_then(|()| in_time(begun));
        let renamed = renamed.and_then(|()| Ok(fs::rename(new, &self.image)?));
        if renamed.is_err() {
            let _ = fs::remove_file(snapshot);
        }
        renamed?;
        // If that does not last, neither may what is written from now on.
        let synced = sync_folders(&files);
        if synced.is_err() && fs::rename(snapshot, &self.image).is_ok() {
            let _ = sync_folders(&files);
        }
        Ok(synced?)
    }

    /// Makes the new image, with owner and mode of the old one.
    fn make(&self, new: &Path, snapshot: &Path) -> Result<()> {
        let size_bytes = qemu_img::info(&self.image)?.virtual_size;
        let is_beside = parent(&self.image)? == fs::canonicalize(parent(snapshot)?)?;
        // QEMU looks for it beside the image then, also when both are moved. With a colon it would be a protocol's.
        let has_colon = |name: &OsStr| name.as_bytes().contains(&b':');
        let backing = match snapshot.file_name() {
            Some(name) if is_beside && !has_colon(name) => Path::new(name),
            _ => snapshot,
        };
        qemu_img::create(new, backing, size_bytes)?;
        let old = fs::metadata(&self.image)?;
        chown(new, Some(old.uid()), Some(old.gid()))?;
        fs::set_permissions(new, old.permissions())?;
        Ok(File::open(new)?.sync_all()?)
    }

    /// Has the image written into the snapshot that it lies over, which takes its place.
    fn commit(&self, snapshot: &Path) -> Result<()> {
        let info = qemu_img::info(&self.image)?;
        let backing = info
            .full_backing_filename
            .with_context(|| format!("{} lies over no snapshot", self.image.display()))?;
        let shown = snapshot.display();
        let proof = File::options()
            .read(true)
            .write(true)
            .open(snapshot)
            .with_context(|| shown.to_string())?;
        let there = proof.metadata()?;
        let is_there = |path: &Path| {
            fs::metadata(path)
                .is_ok_and(|file| (file.dev(), file.ino()) == (there.dev(), there.ino()))
        };
        ensure!(
            is_there(&backing),
            "{shown} is not what the image lies over: that is {}",
            backing.display()
        );
        ensure!(
            info.backing_filename_format.as_deref() == Some("qcow2"),
            "{shown} is no qcow2 image, and could not be served as one: stop {}, qemu-img commit {}",
            self.name,
            quote(&self.image.to_string_lossy())
        );
        self.check_file_system(snapshot)?;
        self.merge(&proof)?;
        self.step(SnapshotStep::Finish)?;
        let begun = Instant::now();
        let exchanged = self.put_in_place(snapshot, is_there, begun);
        let resumed = self.step(SnapshotStep::Resume);
        // It was locked until now: no QEMU uses it any more.
        let _old =
            exchanged.with_context(|| format!("{} is as before, over {shown}", self.name))?;
        let _ = fs::remove_file(self.beside(OLD));
        let merged = format!("{shown} is merged, and has the name of the image");
        match resumed.with_context(|| merged.clone())?.failed {
            Some(why) => bail!("{merged}, which cannot be served: {why}"),
            None => Ok(()),
        }
    }

    /// Gives the snapshot the name of the image. Returns the image that was merged, locked; on an error nothing has changed.
    fn put_in_place(
        &self,
        snapshot: &Path,
        is_there: impl Fn(&Path) -> bool,
        begun: Instant,
    ) -> Result<File> {
        let locked = lock(&self.image)?;
        let _lock = lock(snapshot)?;
        ensure!(
            is_there(snapshot),
            "{} is another file now",
            snapshot.display()
        );
        let (files, old) = ([&*self.image, snapshot], self.beside(OLD));
        remove(&old)?;
        fs::hard_link(&self.image, &old)?;
        let renamed = in_time(begun).and_then(|()| Ok(fs::rename(snapshot, &self.image)?));
        if renamed.is_err() {
            let _ = fs::remove_file(&old);
        }
        renamed?;
        let synced = sync_folders(&files);
        if synced.is_err()
            && fs::hard_link(&self.image, snapshot).is_ok()
            && fs::rename(&old, &self.image).is_ok()
        {
            let _ = sync_folders(&files);
        }
        synced?;
        Ok(locked)
    }

    /// A file beside the image.
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = self.image.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    fn merge(&self, proof: &File) -> Result<()> {
        let progress = io::stderr().is_terminal();
        loop {
            let proof = Some(proof.as_fd());
            let merged = admin::snapshot(&self.control, SnapshotStep::Merge, proof, STEP_LIMIT)?;
            if progress {
                let [done, total] = [merged.done_bytes, merged.total_bytes].map(format_size);
                let end = if merged.is_ready { "\n" } else { "" };
                eprint!("\r\x1b[K{}: {done} of {total} merged{end}", self.name);
                let _ = io::stderr().flush();
            }
            if merged.is_ready {
                return Ok(());
            }
            std::thread::sleep(MERGE_INTERVAL);
        }
    }

    /// Copies a snapshot that is there for that time only.
    fn back_up(&self, file: &Path, format: BackupFormat) -> Result<()> {
        let snapshot = self.beside(BACKUP);
        let commit = format!(
            "ublkup snapshot commit {} {}",
            self.name,
            quote(&snapshot.to_string_lossy())
        );
        ensure!(
            !snapshot.exists(),
            "a backup before was interrupted: {commit}"
        );
        // Made first, so that nothing is begun for a file that cannot be.
        File::create_new(file).with_context(|| file.display().to_string())?;
        let created = self.create(&snapshot);
        if created.is_err() {
            let _ = fs::remove_file(file);
        }
        created?;
        let format = match format {
            BackupFormat::Qcow2 => "qcow2",
            BackupFormat::Raw => "raw",
        };
        let copied = qemu_img::convert(&snapshot, file, format, io::stdout().is_terminal())
            .and_then(|()| Ok(File::open(file)?.sync_all()?))
            .and_then(|()| Ok(sync_folders(&[file])?));
        if copied.is_err() {
            let _ = fs::remove_file(file);
        }
        let committed = self.commit(&snapshot);
        if let Err(error) = committed {
            let error = error.context(format!(
                "{} still lies over the snapshot of the backup: {commit}",
                self.name
            ));
            if copied.is_err() {
                complain(&crate::export::explain(&error));
            } else {
                return Err(error);
            }
        }
        copied
    }

    /// Whether files there can take the place of the image.
    fn check_file_system(&self, path: &Path) -> Result<()> {
        let there = fs::metadata(path).with_context(|| path.display().to_string())?;
        if there.dev() != fs::metadata(&self.image)?.dev() {
            bail!(
                "{} is on another file system than the image, {}: the file cannot get its name",
                path.display(),
                self.image.display()
            );
        }
        Ok(())
    }
}

/// Removes a file that need not be there.
fn remove(file: &Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| file.display().to_string()),
    }
}

/// Keeps QEMU from opening an image.
fn lock(image: &Path) -> Result<File> {
    lock_qemu_image(image).with_context(|| format!("cannot lock {}", image.display()))
}

/// Whether the server certainly waits still. It does not wait for a command that was stopped.
fn in_time(begun: Instant) -> Result<()> {
    match begun.elapsed() < HELD_LIMIT / 2 {
        true => Ok(()),
        false => Err(anyhow!("that took too long")),
    }
}

fn absolute(file: &Path) -> Result<PathBuf> {
    std::path::absolute(file).with_context(|| file.display().to_string())
}

fn parent(file: &Path) -> Result<&Path> {
    file.parent()
        .with_context(|| format!("{} is no file", file.display()))
}

/// What was done to names in the folders of these files lasts.
fn sync_folders(files: &[&Path]) -> io::Result<()> {
    for file in files {
        let folder = file
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    Ok(())
}
