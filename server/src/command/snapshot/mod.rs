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
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::cli::{BackupFormat, Snapshot};
use super::client::served;
use super::output::{complain, print, print_json_text, print_line};
use super::qemu::quote;
use crate::engine::{SnapshotProgress, SnapshotStep};
use crate::export::admin;
use crate::export::runtime_dir::RuntimeDir;
use crate::request::format_size;
use crate::storage::{HELD_LIMIT, LockedOfImage, NEW_IMAGE, lock_qemu_image};
use image::image;

/// How long a step may take: the server limits what its daemon does.
const STEP_LIMIT: Duration = Duration::from_secs(130);

/// How often it is looked how much is merged.
const MERGE_INTERVAL: Duration = Duration::from_millis(200);

/// What follows the name of an image in that of the snapshot that a backup is made of.
const BACKUP: &str = ".ublkup-backup";

/// What follows it in that of one that was merged, until nothing uses it.
const OLD: &str = ".ublkup-old";

/// What follows the name of a backup until it is whole.
const PART: &str = ".ublkup-part";

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
            let file = file.display();
            print_line(&format!(
                "{name}: {file} is what it holds now; what is written from now on is over it"
            ))?;
        }
        Snapshot::Commit { name, file } => {
            disk(name)?.commit(file)?;
            let file = file.display();
            print_line(&format!(
                "{name}: {file} is the image again, with what was written over it"
            ))?;
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
    /// Whether QEMU looks for what the image lies over from its folder, and not from that of a link.
    is_direct: bool,
}

impl Disk {
    fn find(dir: &RuntimeDir, name: &str) -> Result<Self> {
        let control = served(dir, name)?;
        let (image, is_direct) = image(name, &control, &dir.folder(name))?;
        Ok(Self {
            name: name.to_owned(),
            control,
            image,
            is_direct,
        })
    }

    fn step(&self, step: SnapshotStep) -> Result<SnapshotProgress> {
        admin::snapshot(&self.control, step, STEP_LIMIT)
    }

    /// Puts an empty image over the one that is there, which is `snapshot` from then on.
    fn create(&self, snapshot: &Path) -> Result<()> {
        let image = &self.image;
        let _alone = self.alone()?;
        ensure!(
            snapshot.to_str().is_some(),
            "{}: QEMU takes names in UTF-8 only",
            snapshot.display()
        );
        self.check_name(snapshot)?;
        // A command before may have been killed when the image had both names.
        let is_begun = is_same(snapshot, image) && in_its_folder(snapshot)? != *image;
        ensure!(
            is_begun || fs::symlink_metadata(snapshot).is_err(),
            "{} is there already",
            snapshot.display()
        );
        self.check_file_system(parent(snapshot)?)?;
        let info = qemu_img::info(image)?;
        let is_beside = self.is_direct && parent(image)? == parent(&in_its_folder(snapshot)?)?;
        check_movable(&info, is_beside)?;
        let new = self.beside(NEW_IMAGE);
        let made = self.make(&new, snapshot, (info.virtual_size, is_beside));
        // What comes later must not come after the end of the pause.
        let begun = Instant::now();
        if let Err(error) = made.and_then(|()| self.step(SnapshotStep::Begin)) {
            let _ = remove(&new);
            return Err(error);
        }
        if let Err(error) = self.put_over(&new, snapshot, (begun, is_begun)) {
            let _ = remove(&new);
            let _ = self.step(SnapshotStep::Resume);
            return Err(error.context(format!("{} is as before", self.name)));
        }
        let over = || format!("{} lies over {}", image.display(), snapshot.display());
        let resumed = self
            .step(SnapshotStep::Resume)
            .with_context(|| format!("{}, and is not served", over()))?;
        let Some(why) = resumed.failed else {
            return Ok(());
        };
        // Requests still wait, and what is there shows what the snapshot has.
        let begun = Instant::now();
        let taken_back = lock_for_names(image).and_then(|_lock| {
            in_time(begun)?;
            fs::rename(snapshot, image)?;
            Ok(sync_folders(&[image, snapshot])?)
        });
        let _ = self.step(SnapshotStep::Resume);
        taken_back.with_context(over)?;
        bail!(
            "{} is as before: the new image cannot be served: {why}",
            self.name
        )
    }

    /// Gives the image the name of the snapshot, and its own to the new one. On an error nothing has changed.
    fn put_over(
        &self,
        new: &Path,
        snapshot: &Path,
        (begun, is_begun): (Instant, bool),
    ) -> Result<()> {
        let _lock = lock_for_names(&self.image)?;
        // QEMU has had it open.
        File::open(new)?.sync_all()?;
        if !is_begun {
            fs::hard_link(&self.image, snapshot).with_context(|| snapshot.display().to_string())?;
        }
        let files = [&*self.image, snapshot];
        let renamed = in_time(begun).and_then(|()| Ok(fs::rename(new, &self.image)?));
        if renamed.is_err() && !is_begun {
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
    fn make(
        &self,
        new: &Path,
        snapshot: &Path,
        (size_bytes, is_beside): (u64, bool),
    ) -> Result<()> {
        // QEMU looks for it beside the image then, also when both are moved. With a colon it would be a protocol's.
        let has_colon = |name: &OsStr| name.as_bytes().contains(&b':');
        let backing = match snapshot.file_name() {
            Some(name) if is_beside && !has_colon(name) => Path::new(name),
            _ => snapshot,
        };
        qemu_img::create(new, backing, size_bytes)?;
        self.give_owner(new)?;
        Ok(File::open(new)?.sync_all()?)
    }

    /// Gives a file owner and mode of the image.
    fn give_owner(&self, file: &Path) -> Result<()> {
        let old = fs::metadata(&self.image)?;
        chown(file, Some(old.uid()), Some(old.gid()))?;
        Ok(fs::set_permissions(file, old.permissions())?)
    }

    /// Has the image written into the snapshot that it lies over, which takes its place.
    fn commit(&self, snapshot: &Path) -> Result<()> {
        // It is renamed itself, and not a link to it.
        let snapshot =
            &fs::canonicalize(snapshot).with_context(|| snapshot.display().to_string())?;
        let _alone = self.alone()?;
        self.check_name(snapshot)?;
        let info = qemu_img::info(&self.image)?;
        let image = self.image.display();
        let backing = (info.full_backing_filename)
            .with_context(|| format!("{image} lies over no snapshot"))?;
        let shown = snapshot.display();
        // Without it the keeper does not merge: who has it may write to the file. It is not handed to the server.
        let merge = LockedOfImage::Merge(fs::metadata(&self.image)?.ino());
        let lock = lock_qemu_image(snapshot, merge).with_context(|| shown.to_string())?;
        let there = lock.metadata()?;
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
        let is_beside =
            self.is_direct && parent(&self.image)? == parent(&fs::canonicalize(snapshot)?)?;
        check_movable(&qemu_img::info(snapshot)?, is_beside)?;
        self.merge()?;
        let begun = Instant::now();
        self.step(SnapshotStep::Finish)?;
        let exchanged = self.put_in_place(snapshot, is_there, begun);
        let resumed = self.step(SnapshotStep::Resume);
        // It is locked until now: no QEMU uses it any more.
        let old = exchanged.with_context(|| format!("{} is as before, over {shown}", self.name))?;
        let merged = format!("{shown} is merged, and has the name of the image");
        let Some(why) = resumed.with_context(|| merged.clone())?.failed else {
            let _ = fs::remove_file(self.beside(OLD));
            return Ok(());
        };
        // Requests still wait, and the image that was merged shows the same.
        let begun = Instant::now();
        let taken_back = lock_for_names(&self.image).and_then(|_lock| {
            in_time(begun)?;
            fs::hard_link(&self.image, snapshot)?;
            fs::rename(self.beside(OLD), &self.image)?;
            Ok(sync_folders(&[&self.image, snapshot])?)
        });
        drop(old);
        let _ = self.step(SnapshotStep::Resume);
        taken_back.with_context(|| merged)?;
        bail!(
            "{} is as before, over {shown}: that cannot be served as the image: {why}",
            self.name
        )
    }

    /// Gives the snapshot the name of the image. Returns the image that was merged, locked; on an error nothing has changed.
    fn put_in_place(
        &self,
        snapshot: &Path,
        is_there: impl Fn(&Path) -> bool,
        begun: Instant,
    ) -> Result<File> {
        let locked = lock_for_names(&self.image)?;
        let _lock = lock_for_names(snapshot)?;
        ensure!(
            is_there(snapshot),
            "{} is another file now",
            snapshot.display()
        );
        let (files, old) = ([&*self.image, snapshot], self.beside(OLD));
        fs::hard_link(&self.image, &old).with_context(|| old.display().to_string())?;
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

    /// Keeps other commands out, and removes what one that was killed has left.
    fn alone(&self) -> Result<File> {
        let alone = lock_qemu_image(&self.image, LockedOfImage::Names)
            .with_context(|| format!("another command is at work on {}", self.image.display()))?;
        let chain = qemu_img::chain(&self.image)?;
        for left in [NEW_IMAGE, OLD].map(|suffix| self.beside(suffix)) {
            ensure!(
                !chain.iter().any(|one| is_same(&one.filename, &left)),
                "{} is in use: give it another name (qemu-img rebase -u)",
                left.display()
            );
            remove(&left)?;
        }
        Ok(alone)
    }

    /// Whether a file may have this name: those beside the image are this command's.
    fn check_name(&self, file: &Path) -> Result<()> {
        let is_own = [NEW_IMAGE, OLD].map(|suffix| self.beside(suffix));
        let file = in_its_folder(file)?;
        ensure!(
            !is_own.contains(&file),
            "{}: the commands use that name themselves",
            file.display()
        );
        Ok(())
    }

    /// A file beside the image.
    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = self.image.clone().into_os_string();
        path.push(suffix);
        path.into()
    }

    fn merge(&self) -> Result<()> {
        let progress = io::stderr().is_terminal();
        loop {
            let merged = self.step(SnapshotStep::Merge)?;
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
            !snapshot.exists() || is_same(&snapshot, &self.image),
            "a backup before was interrupted: {commit}"
        );
        self.check_name(file)?;
        ensure!(
            *file != snapshot,
            "{}: the commands use that name themselves",
            file.display()
        );
        ensure!(
            fs::symlink_metadata(file).is_err(),
            "{} is there already",
            file.display()
        );
        // It has its name when it is whole.
        let mut part = file.as_os_str().to_owned();
        part.push(PART);
        let part = PathBuf::from(part);
        let mut options = File::options();
        let made = options.write(true).create_new(true).mode(0o600).open(&part);
        made.with_context(|| part.display().to_string())?;
        let created = self.give_owner(&part).and_then(|()| self.create(&snapshot));
        if created.is_err() {
            let _ = fs::remove_file(&part);
        }
        created?;
        let format = match format {
            BackupFormat::Qcow2 => "qcow2",
            BackupFormat::Raw => "raw",
        };
        let copied = qemu_img::convert(&snapshot, &part, format, io::stdout().is_terminal())
            .and_then(|()| Ok(File::open(&part)?.sync_all()?))
            .and_then(|()| {
                name_whole(&part, file).with_context(|| file.display().to_string())?;
                Ok(sync_folders(&[file])?)
            });
        if copied.is_err() {
            let _ = fs::remove_file(&part);
        }
        let committed = self.commit(&snapshot);
        if let Err(error) = committed {
            let error = error.context(format!(
                "{} still lies over the snapshot of the backup: {commit}",
                self.name
            ));
            match copied {
                Ok(()) => return Err(error),
                Err(_) => complain(&crate::export::explain(&error)),
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

/// Whether an image may get a name in another folder.
fn check_movable(info: &qemu_img::Info, is_beside: bool) -> Result<()> {
    let file = info.filename.display();
    if let Some(data) = info.data_file() {
        bail!("{file} has its data in another file, {data}");
    }
    ensure!(
        is_beside || !info.is_bound_to_its_folder(),
        "{file} names its backing file as seen from its own folder: keep the snapshot in the folder of the image, or have it say the \
         whole path (qemu-img rebase -u)"
    );
    Ok(())
}

/// Gives a file its name, which nothing has.
fn name_whole(part: &Path, file: &Path) -> io::Result<()> {
    match renameat_with(CWD, part, CWD, file, RenameFlags::NOREPLACE) {
        // NFS has no such rename.
        Err(Errno::INVAL) if fs::symlink_metadata(file).is_err() => fs::rename(part, file),
        other => Ok(other?),
    }
}

/// Whether these are names of the same file.
fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()));
    matches!((identity(one), identity(other)), (Ok(one), Ok(other)) if one == other)
}

/// Keeps QEMU from opening an image.
fn lock_for_names(image: &Path) -> Result<File> {
    lock_qemu_image(image, LockedOfImage::Qemu)
        .with_context(|| format!("cannot lock {}", image.display()))
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

/// The path of a file that need not be there, without links to its folder.
fn in_its_folder(file: &Path) -> Result<PathBuf> {
    let file = absolute(file)?;
    let folder = parent(&file)?;
    let folder = fs::canonicalize(folder).with_context(|| folder.display().to_string())?;
    Ok(folder.join(file.file_name().unwrap_or_default()))
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
