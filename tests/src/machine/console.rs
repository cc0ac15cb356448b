//! A machine's console: copied to a file while it runs, quoted when it fails.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};

use testkit::shell::last_lines;

/// The console of one machine.
#[derive(Debug)]
pub struct Console {
    path: PathBuf,
    file: File,
    copier: Option<JoinHandle<()>>,
}

impl Console {
    /// Copies the child's standard error to a fresh file at `path`, until it ends.
    pub fn start(child: &mut Child, path: &Path) -> Result<Self> {
        let mut pipe = child.stderr.take().context("the console is not piped")?;
        let file = File::options()
            .create(true)
            .write(true)
            .truncate(true)
            .open(path)
            .and_then(|_| File::options().append(true).open(path))
            .with_context(|| format!("cannot write the console log {}", path.display()))?;
        let mut copy = file.try_clone().context("cannot share the console log")?;
        let copier = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                // A full disk loses the log, but must not block the machine.
                let _lost = copy.write_all(&buffer[..count]);
            }
        });
        Ok(Console {
            path: path.to_owned(),
            file,
            copier: Some(copier),
        })
    }

    /// Another way into the log, for what is said elsewhere.
    pub fn sink(&self) -> impl Write + Send + use<> {
        self.file.try_clone().map_or_else(
            |_| Box::new(std::io::sink()) as Box<dyn Write + Send>,
            |file| Box::new(file),
        )
    }

    /// Waits for the rest, after the machine was killed.
    pub fn finish(&mut self) {
        if let Some(copier) = self.copier.take() {
            // It ends when the machine's last process does.
            let _ended = copier.join();
        }
    }

    /// The log file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All of the log so far.
    pub fn text(&self) -> String {
        fs::read(&self.path)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// An error with the end of the log, and where the whole of it is.
    pub fn explain(&self, error: &anyhow::Error) -> anyhow::Error {
        anyhow!(
            "{error:#}\nits console ({}) ends with:\n{}",
            self.path.display(),
            last_lines(self.text().trim_end(), 25)
        )
    }
}
