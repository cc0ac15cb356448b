//! The example pair, run as a shell would: `pipe_server | pipe_client`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

/// An example's program; built here if only this test was asked for.
fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program's path");
    let path = test
        .ancestors()
        .nth(2)
        .expect("the target directory")
        .join("examples")
        .join(name);
    if !path.exists() {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--package", "upgrade-proto", "--example", name])
            .status();
        assert!(
            built.expect("cargo runs").success(),
            "example {name} builds"
        );
    }
    path
}

#[test]
fn the_two_ends_of_a_pipe_exchange_memory_and_greetings() {
    let runtime_dir = tempfile::tempdir().expect("a directory");
    let mut server = Command::new(example("pipe_server"))
        .arg(runtime_dir.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the server starts");
    let pipe = server.stdout.take().expect("the pipe");
    let client = Command::new(example("pipe_client"))
        .arg(runtime_dir.path())
        .stdin(pipe)
        .output()
        .expect("the client");
    let server = server.wait_with_output().expect("the server ends");
    let said = String::from_utf8_lossy(&client.stdout);
    let errors = String::from_utf8_lossy(&client.stderr);
    assert!(
        client.status.success() && server.status.success(),
        "{said} {errors}"
    );
    assert!(
        said.contains("the pipe says 'one line for those who only read'"),
        "{said}"
    );
    assert!(
        said.contains("'hello from the server', memory says 'written by the server'"),
        "{said}"
    );
    let said = String::from_utf8_lossy(&server.stderr);
    assert!(
        said.contains("'hello from the client', memory says 'written by the client'"),
        "{said}"
    );
}

#[test]
fn a_reader_without_a_server_stays_with_the_pipe() {
    use std::io::Write;
    let runtime_dir = tempfile::tempdir().expect("a directory");
    let (read, mut write) = std::io::pipe().expect("a pipe");
    writeln!(write, "plain").expect("written");
    let client = Command::new(example("pipe_client"))
        .arg(runtime_dir.path())
        .stdin(read)
        .output()
        .expect("the client");
    let said = String::from_utf8_lossy(&client.stdout);
    assert!(
        client.status.success() && said.contains("staying with the pipe: nobody offers"),
        "{said}"
    );
}
