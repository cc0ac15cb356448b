//! The server's declarations of the libraries' functions, and the headers.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Stdio};

/// What the server declares: `name(argument, …) -> result;` for each function.
const LIBRARY: &str = include_str!("../../src/storage/rbd/library.rs");

/// A type as C has it.
fn c_type(rust: &str, is_lock_mode: bool) -> String {
    match rust.trim() {
        "*mut c_int" if is_lock_mode => "rbd_lock_mode_t *".into(),
        "c_int" if is_lock_mode => "rbd_lock_mode_t".into(),
        "c_int" => "int".into(),
        "i64" => "int64_t".into(),
        "u32" => "uint32_t".into(),
        "u64" => "uint64_t".into(),
        "usize" => "size_t".into(),
        "isize" => "ssize_t".into(),
        "bool" => "bool".into(),
        "Rados" => "rados_t".into(),
        "Pool" => "rados_ioctx_t".into(),
        "Image" => "rbd_image_t".into(),
        "Completion" => "rbd_completion_t".into(),
        "Callback" => "rbd_callback_t".into(),
        "WatchCallback" => "rados_watchcb2_t".into(),
        "LostCallback" => "rados_watcherrcb_t".into(),
        "UpdateCallback" => "rbd_update_callback_t".into(),
        "Progress" => "librbd_progress_fn_t".into(),
        "Watcher" => "rbd_image_watcher_t".into(),
        "c_char" => "char".into(),
        "c_void" => "void".into(),
        rust => match rust.split_once(' ') {
            Some(("*mut", to)) => format!("{} *", c_type(to, false)),
            Some(("*const", to)) => format!("const {} *", c_type(to, false)),
            _ => panic!("no C type is known for {rust}"),
        },
    }
}

/// `text` as a program of C, which declares all of it once more.
fn in_c(text: &str) -> String {
    let mut program =
        "#include <stdbool.h>\n#include <stddef.h>\n#include <rados/librados.h>\n#include <rbd/librbd.h>\n".to_owned();
    let (_, declared) = text.split_once("\nfunctions! {").unwrap();
    let (declared, _) = declared.split_once("\n}\n").unwrap();
    for line in declared.lines().map(str::trim) {
        let Some((name, rest)) = line.split_once('(') else {
            continue;
        };
        let (arguments, result) = rest.strip_suffix(';').unwrap().split_once(')').unwrap();
        let result = result.trim().strip_prefix("-> ").unwrap_or("c_void");
        let is_mode = |place| name.starts_with("rbd_lock_") && place == 1;
        let arguments: Vec<_> = (arguments.split(", ").enumerate())
            .map(|(place, argument)| c_type(argument, is_mode(place)))
            .collect();
        let (result, arguments) = (c_type(result, false), arguments.join(", "));
        writeln!(program, "{result} {name}({arguments});").unwrap();
    }
    program.push_str(
        "_Static_assert(sizeof(rbd_image_watcher_t) == 24, \"\");\n\
         _Static_assert(offsetof(rbd_image_watcher_t, addr) == 0, \"\");\n\
         _Static_assert(RBD_LOCK_MODE_EXCLUSIVE == 0, \"\");\n\
         _Static_assert(RBD_FEATURE_EXCLUSIVE_LOCK == 1 << 2, \"\");\n\
         _Static_assert(RBD_WRITE_ZEROES_FLAG_THICK_PROVISION == 1, \"\");\n\
         _Static_assert(sizeof(enum { A }) == sizeof(rbd_lock_mode_t), \"\");\n",
    );
    program
}

/// Whether a compiler of C takes it, and what it says.
fn compile(program: &str) -> (bool, String) {
    let include = std::env::var("CEPH_INCLUDE").unwrap_or_else(|_| "/usr/include".into());
    let mut compiler = Command::new("cc")
        .args(["-fsyntax-only", "-xc", "-I", &include, "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = compiler.stdin.take().unwrap();
    input.write_all(program.as_bytes()).unwrap();
    drop(input);
    let done = compiler.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    (done.status.success(), said)
}

#[test]
#[ignore = "needs a Ceph cluster"]
fn the_functions_are_declared_as_in_the_headers() {
    let program = in_c(LIBRARY);
    assert!(program.contains("int rbd_aio_write("), "{program}");
    let (is_same, said) = compile(&program);
    assert!(is_same, "{said}\n{program}");
    // The compiler looks.
    let wrong = program.replace("int rbd_close(rbd_image_t)", "int rbd_close(int)");
    assert_ne!(wrong, program);
    assert!(!compile(&wrong).0);
}
