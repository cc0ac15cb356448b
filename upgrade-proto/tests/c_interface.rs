//! The C interface: a C program is compiled against the header and run with the shared library.

use std::path::Path;
use std::process::Command;

#[test]
fn a_c_program_offers_and_finds_a_service() {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR"));
    let test = std::env::current_exe().expect("this program's path");
    let libraries = test.parent().expect("the directory of libraries");
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("c_interface");
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
        .arg("-I")
        .arg(sources.join("include"))
        .arg(sources.join("tests/c_interface.c"))
        .arg("-L")
        .arg(libraries)
        .arg("-lupgrade_proto")
        .output()
        .expect("the C compiler 'cc' runs (install gcc or clang)");
    assert!(
        compiled.status.success(),
        "{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let runtime_dir = tempfile::tempdir().expect("a directory");
    let run = Command::new(&program)
        .arg(runtime_dir.path())
        .env("LD_LIBRARY_PATH", libraries)
        .output();
    let run = run.expect("the program runs");
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success() && said == "passed\n",
        "{said}{}",
        String::from_utf8_lossy(&run.stderr)
    );
}
