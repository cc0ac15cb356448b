//! What opening refuses, and in which words. Locks, devices and sizes are in `tests/file.rs`.

use super::*;
use crate::request::Serial;
use crate::storage::CacheMode;

fn options(path: &Path, cache: CacheMode, read_only: bool) -> FileOptions {
    FileOptions {
        export: "test".into(),
        path: path.to_owned(),
        cache,
        format: None,
        read_only,
        block_bytes: None,
        serial: Serial::new("test").unwrap(),
        claim_later: false,
    }
}

fn refusal(options: FileOptions) -> OpenError {
    open(options).map(|_| ()).expect_err("must be refused")
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
    path
}

/// Runs `body` in a thread with the file access of nobody, whoever we are.
fn as_nobody<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let nobody = scope.spawn(|| {
            if rustix::process::geteuid().is_root() {
                // SAFETY: changes this thread's identity for file access and nothing else.
                unsafe { libc::setfsuid(65534) };
            }
            body()
        });
        nobody.join().unwrap()
    })
}

#[test]
fn a_file_that_may_only_be_read_is_refused_with_a_hint_and_opens_read_only() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = image(dir.path());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
    as_nobody(|| {
        let message = refusal(options(&path, CacheMode::Auto, false)).to_string();
        assert!(message.contains("Permission denied"), "{message}");
        assert!(message.contains("--read-only"), "{message}");
        let (limits, _) = open(options(&path, CacheMode::Auto, true)).unwrap();
        assert!(limits.read_only);
        assert_eq!(limits.max_discard_bytes, 0);
        assert_eq!(limits.max_write_zeroes_bytes, 0);
    });
}

#[test]
fn a_missing_file_is_refused_without_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let message = refusal(options(&dir.path().join("none"), CacheMode::Auto, false)).to_string();
    assert!(message.contains("/none: No such file"), "{message}");
    assert!(!message.contains("--read-only"), "{message}");
}

#[test]
fn direct_is_refused_where_the_file_system_cannot_and_auto_goes_through_the_page_cache() {
    // procfs has no O_DIRECT.
    let path = Path::new("/proc/self/status");
    let error = refusal(options(path, CacheMode::Direct, true));
    assert!(matches!(error, OpenError::NotDirect(_)), "{error}");
    assert!(error.to_string().contains("cache=auto"));
    // Through the page cache it gets as far as its size, which procfs does not tell.
    let error = refusal(options(path, CacheMode::Auto, true));
    assert!(!matches!(error, OpenError::NotDirect(_)), "{error}");
}

#[test]
fn a_block_size_that_is_too_small_is_refused_with_a_hint_that_helps() {
    for (is_device, hints) in [(false, true), (true, false)] {
        let message = OpenError::BlockSize {
            path: "/x".into(),
            needed_bytes: 4096,
            asked_bytes: 512,
            is_device,
        }
        .to_string();
        assert!(message.contains("blocks of 4096 bytes, not 512: leave block-size out"));
        assert_eq!(message.contains("cache=buffered"), hints, "{message}");
    }
}

#[test]
fn io_uring_sees_no_nonblocking_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    for cache in [CacheMode::Auto, CacheMode::Direct, CacheMode::Buffered] {
        let (_, shared) = open(options(&path, cache, false)).unwrap();
        let flags = fcntl_getfl(&shared.file).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK), "{cache:?}");
        assert_eq!(
            flags.contains(OFlags::DIRECT),
            shared.alignment.is_some(),
            "{cache:?}"
        );
    }
}

#[test]
fn a_file_that_was_opened_in_another_way_is_not_adopted() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path());
    let open = |write, flags: OFlags| {
        let mut how = fs::OpenOptions::new();
        how.read(true).write(write);
        how.custom_flags(flags.bits().cast_signed());
        how.open(&path).unwrap()
    };
    let check = |file: &fs::File, read_only| {
        check_opened(&options(&path, CacheMode::Auto, read_only), file)
    };
    let none = OFlags::empty();
    assert!(check(&open(true, none), false).is_ok());
    assert!(check(&open(true, none), true).is_ok());
    assert!(check(&open(false, none), true).is_ok());
    assert!(check(&open(false, none), false).is_err());
    assert!(check(&open(true, OFlags::APPEND), false).is_err());
    assert!(check(&open(false, OFlags::PATH), true).is_err());
    let (pipe, _other_end) = io::pipe().unwrap();
    let pipe = fs::File::from(std::os::fd::OwnedFd::from(pipe));
    assert!(matches!(check(&pipe, true), Err(OpenError::Kind { .. })));
    let folder = fs::File::open(dir.path()).unwrap();
    assert!(matches!(check(&folder, true), Err(OpenError::Kind { .. })));
}
