//! What a client wrote, after its server was killed.

mod common;

use common::{Driver, OK, USUAL, sandbox};

#[test]
fn what_was_written_is_read_back_from_the_next_server() {
    let sandbox = sandbox();
    let spec = format!("file:{}", sandbox.image("image", 1 << 20).display());
    let args = ["--name", "disk", "--ublk", "no", &spec];

    let server = sandbox.serve(&args);
    let mut driver = Driver::running(sandbox.connect("disk"), USUAL);
    assert_eq!(driver.write(8, &[7; 4096]), OK);
    drop(driver);
    server.kill().unwrap();

    let server = sandbox.serve(&args);
    let mut driver = Driver::running(sandbox.connect("disk"), USUAL);
    assert_eq!(driver.read(8, 4096), (OK, vec![7; 4096]));
    drop(driver);
    server.stop().unwrap();
    sandbox.is_clean();
}
