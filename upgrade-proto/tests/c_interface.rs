//! The C interface: the library is installed as docs/upgrade.md says, and C programs are compiled against it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// An installed library.
struct Prefix(TempDir);

impl Prefix {
    fn install() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let test = std::env::current_exe().expect("this program's path");
        let libraries = test.parent().expect("the directory of libraries");
        let script = source("install.sh");
        let installed = Command::new(script).arg(dir.path()).arg(libraries).output();
        expect_success(&installed.expect("the script runs"));
        Self(dir)
    }

    fn library(&self, name: &str) -> PathBuf {
        self.0.path().join("lib").join(name)
    }

    /// What the compiler is told by pkg-config, or by the same file's words where there is no pkg-config.
    fn flags(&self, more: &[&str]) -> Vec<String> {
        let asked = Command::new("pkg-config")
            .args(["--cflags", "--libs", "upgrade_proto"])
            .args(more)
            .env("PKG_CONFIG_PATH", self.library("pkgconfig"))
            .output();
        let text = match asked {
            Ok(output) => expect_success(&output),
            Err(_) => {
                let file = self.library("pkgconfig/upgrade_proto.pc");
                let file = fs::read_to_string(file).expect("read");
                let keys = ["Cflags: ", "Libs: ", "Libs.private: "];
                let wanted = &keys[..if more.is_empty() { 2 } else { 3 }];
                let values = file
                    .lines()
                    .filter_map(|line| wanted.iter().find_map(|key| line.strip_prefix(key)));
                let prefix = self.0.path().to_str().expect("UTF-8");
                let text = values.collect::<Vec<_>>().join(" ");
                text.replace("${includedir}", &format!("{prefix}/include"))
                    .replace("${libdir}", &format!("{prefix}/lib"))
            }
        };
        text.split_whitespace().map(str::to_owned).collect()
    }

    fn compile(&self, source: &Path, flags: &[String]) -> PathBuf {
        let program = self.0.path().join(source.file_stem().expect("a name"));
        let compiled = Command::new("cc")
            .args([
                "-std=c11",
                "-D_GNU_SOURCE",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-o",
            ])
            .arg(&program)
            .arg(source)
            .args(flags)
            .output();
        expect_success(&compiled.expect("the C compiler 'cc' runs (install gcc or clang)"));
        program
    }

    fn run(&self, program: &Path, argument: &Path) -> Output {
        let mut command = Command::new(program);
        command
            .arg(argument)
            .env("LD_LIBRARY_PATH", self.library(""));
        command.output().expect("the program runs")
    }
}

fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn expect_success(output: &Output) -> String {
    let [out, err] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
    assert!(output.status.success(), "{out}{err}");
    out
}

#[test]
fn a_c_program_offers_and_finds_a_service_with_the_shared_and_the_static_library() {
    let prefix = Prefix::install();
    let program = source("tests/c_interface.c");
    let shared = prefix.flags(&[]);
    let archive = prefix.library("libupgrade_proto.a").display().to_string();
    let with_archive = prefix.flags(&["--static"]).into_iter();
    let with_archive = with_archive.map(|flag| match flag.as_str() {
        "-lupgrade_proto" => archive.clone(),
        _ => flag,
    });
    for flags in [shared, with_archive.collect()] {
        let runtime_dir = tempfile::tempdir().expect("a directory");
        let run = prefix.run(&prefix.compile(&program, &flags), runtime_dir.path());
        assert_eq!(expect_success(&run), "passed\n");
    }
}

#[test]
fn a_program_asks_for_the_library_by_its_major_version() {
    let prefix = Prefix::install();
    let program = prefix.compile(&source("tests/c_interface.c"), &prefix.flags(&[]));
    let major = env!("CARGO_PKG_VERSION_MAJOR");
    let needed = fs::read(program).expect("read");
    let name = format!("libupgrade_proto.so.{major}\0");
    assert!(
        needed
            .windows(name.len())
            .any(|bytes| bytes == name.as_bytes())
    );
    let file = prefix
        .library(&format!("libupgrade_proto.so.{major}"))
        .canonicalize()
        .expect("installed");
    assert!(file.ends_with(concat!("libupgrade_proto.so.", env!("CARGO_PKG_VERSION"))));
}

#[test]
fn the_program_in_the_documentation_compiles_as_printed_and_says_why_not() {
    let prefix = Prefix::install();
    let text = fs::read_to_string(source("../docs/upgrade.md")).expect("read");
    let (_, rest) = text.split_once("```c\n").expect("a program in C");
    let (printed, _) = rest.split_once("```").expect("its end");
    let file = prefix.0.path().join("printed.c");
    fs::write(&file, printed).expect("written");
    let run = prefix.run(&prefix.compile(&file, &prefix.flags(&[])), &file);
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(
        said.contains("not upgraded") && said.contains("Block device required"),
        "{said}"
    );
    assert!(
        run.status.success(),
        "the program goes on with what it has: {}",
        run.status
    );
}
