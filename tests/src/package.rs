//! `cargo lab package`: the packages of distributions, out of the tree that `server/package/install.sh` makes. Debian's
//! and Red Hat's own tools pack it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::shell::Shell;

use crate::cargo::{self, Build};
use crate::progress;

/// Below a repository.
const SOURCES: &str = "server/package";

/// How long a step of packing may take.
const LIMIT: Duration = Duration::from_secs(300);

/// What was built.
#[derive(Clone, Debug)]
pub struct Packages {
    /// For Debian.
    pub deb: PathBuf,
    /// For Fedora and its kin.
    pub rpm: PathBuf,
}

/// Builds server and library, and packs them in `target/package`. Another revision is another version for the package
/// managers.
pub fn build(repo: &Path, revision: u32) -> Result<Packages> {
    let target = cargo::target_dir()?;
    cargo::build_server(repo, Build::Product)?;
    let mut library = cargo::cargo(repo);
    library
        .args(["build", "--release", "--locked", "-p", "upgrade-proto"])
        .arg("--target-dir")
        .arg(&target);
    let log = target.join("lab-build-library.log");
    let hour = Duration::from_secs(3600);
    progress::run("building the C library", library, &log, hour)?;
    // cargo has one place for the server with test equipment and for the one without.
    let built = target.join("lab/product");
    for name in ["libupgrade_proto.so", "libupgrade_proto.a"] {
        let from = target.join("release").join(name);
        fs::copy(&from, built.join(name))
            .with_context(|| format!("cannot copy {}", from.display()))?;
    }
    pack(repo, &built, &target.join("package"), revision)
}

/// Packs what is in `built`.
fn pack(repo: &Path, built: &Path, into: &Path, revision: u32) -> Result<Packages> {
    fs::create_dir_all(into).with_context(|| format!("cannot create {}", into.display()))?;
    let work = tempfile::tempdir_in(into).context("cannot make a directory")?;
    let version = env!("CARGO_PKG_VERSION");
    let sources = repo.join(SOURCES);
    let architecture = Shell::new("dpkg").arg("--print-architecture").run()?;
    let triplet = Shell::new("dpkg-architecture")
        .args(["-q", "DEB_HOST_MULTIARCH"])
        .run()?;

    let tree = work.path().join("deb");
    let libraries = format!("lib/{}", triplet.trim());
    let vendor = "/usr/share/zsh/vendor-completions";
    install(&sources, built, &tree, &libraries, vendor)?;
    let control = tree.join("DEBIAN");
    fs::create_dir(&control).context("cannot make the control directory")?;
    for name in ["conffiles", "triggers", "postinst", "prerm", "postrm"] {
        let mode = if name.starts_with('p') { "755" } else { "644" };
        Shell::new("install")
            .args(["-m", mode])
            .args([sources.join("deb").join(name), control.join(name)])
            .run()?;
    }
    Shell::new("install")
        .args(["-m", "644"])
        .arg(sources.join("deb/copyright"))
        .arg(tree.join("usr/share/doc/ublkup/copyright"))
        .run()?;
    let size_kib = Shell::new("du").args(["-ks", "--apparent-size"]).arg(&tree);
    let size_kib = size_kib.run()?;
    let text = fs::read_to_string(sources.join("deb/control"))?
        .replace("@VERSION@", &format!("{version}-{revision}"))
        .replace("@ARCHITECTURE@", architecture.trim())
        .replace("@SIZE@", size_kib.split('\t').next().unwrap_or_default())
        .replace("@DEPENDS@", &dependencies(&tree, work.path())?);
    fs::write(control.join("control"), text).context("cannot write the control file")?;
    let deb = into.join(format!(
        "ublkup_{version}-{revision}_{}.deb",
        architecture.trim()
    ));
    Shell::new("dpkg-deb")
        .args(["--root-owner-group", "-Zxz", "--build"])
        .args([&tree, &deb])
        .limit(LIMIT)
        .run()?;

    let tree = work.path().join("rpm");
    let site = "/usr/share/zsh/site-functions";
    install(&sources, built, &tree, "lib64", site)?;
    let top = work.path().join("rpmbuild");
    Shell::new("rpmbuild")
        .arg("-bb")
        .args(["--define", &format!("_topdir {}", top.display())])
        .args(["--define", &format!("_rpmdir {}", into.display())])
        .args([
            "--define",
            "_rpmfilename %{NAME}-%{VERSION}-%{RELEASE}.%{ARCH}.rpm",
        ])
        .args(["--define", &format!("tree {}", tree.display())])
        .args(["--define", &format!("version {version}")])
        .args(["--define", &format!("revision {revision}")])
        .arg(sources.join("rpm/ublkup.spec"))
        .limit(LIMIT)
        .run()?;
    let machine = std::env::consts::ARCH;
    let rpm = into.join(format!("ublkup-{version}-{revision}.{machine}.rpm"));
    ensure!(rpm.exists(), "rpmbuild made no {}", rpm.display());
    Ok(Packages { deb, rpm })
}

/// The files of a package below `tree`, without what only debuggers read.
fn install(sources: &Path, built: &Path, tree: &Path, libraries: &str, zsh: &str) -> Result<()> {
    Shell::new(sources.join("install.sh"))
        .arg(built)
        .env("DESTDIR", tree)
        .env("LIBDIR", libraries)
        .env("ZSHDIR", zsh)
        .limit(LIMIT)
        .run()?;
    let library = format!("usr/{libraries}/libupgrade_proto.so");
    Shell::new("strip")
        .arg("--strip-debug")
        .args([tree.join("usr/bin/ublkup"), tree.join(library)])
        .run()?;
    Ok(())
}

/// The packages that program and library need, with the versions they need on the release that this machine runs.
fn dependencies(tree: &Path, work: &Path) -> Result<String> {
    // It reads the name of a source package.
    fs::create_dir_all(work.join("debian")).context("cannot make a directory")?;
    fs::write(
        work.join("debian/control"),
        "Source: ublkup\n\nPackage: ublkup\nArchitecture: any\n",
    )?;
    let found = Shell::new("dpkg-shlibdeps")
        .arg("-O")
        .arg(tree.join("usr/bin/ublkup"))
        .dir(work)
        .run()?;
    let list = found.trim().strip_prefix("shlibs:Depends=");
    Ok(list.context("dpkg-shlibdeps found nothing")?.to_owned())
}
