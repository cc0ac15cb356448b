//! Where another process has the C library's allocator.

use std::ffi::CStr;
use std::fs;
use std::path::PathBuf;

/// Functions that allocate. None of them calls another through its entry.
const FUNCTIONS: [&CStr; 5] = [
    c"malloc",
    c"calloc",
    c"realloc",
    c"posix_memalign",
    c"aligned_alloc",
];

/// The entries of the allocator in a process that has the same C library as this one, which tells their
/// places in it; none if it has another one, or none.
pub fn entries(pid: u32) -> Vec<u64> {
    let (Some(here), Some(there)) = (CLibrary::of("self"), CLibrary::of(&pid.to_string())) else {
        return Vec::new();
    };
    if here.file != there.file {
        return Vec::new();
    }
    let places = FUNCTIONS.iter().filter_map(|name| {
        // SAFETY: the name is a C string; nothing is done with what is found but to take its address.
        let at = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        let at = u64::try_from(at.addr()).ok()?;
        // Not if another allocator has been put before the C library's.
        (here.first..here.end)
            .contains(&at)
            .then(|| at - here.first + there.first)
    });
    places.collect()
}

/// The C library in a process.
#[derive(Debug)]
struct CLibrary {
    file: PathBuf,
    /// Its first address.
    first: u64,
    /// The address behind its last.
    end: u64,
}

impl CLibrary {
    /// From `/proc/PID/maps` (proc_pid_maps(5)).
    fn of(pid: &str) -> Option<Self> {
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
        let mut found: Option<Self> = None;
        for line in maps.lines() {
            let mut fields = line.split_whitespace();
            let (range, file) = (fields.next()?, fields.nth(4));
            let Some(file) = file.filter(|file| file.ends_with("/libc.so.6")) else {
                continue;
            };
            let (first, end) = range.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            let (first, end) = (number(first)?, number(end)?);
            match &mut found {
                Some(library) => library.end = end,
                None => {
                    found = Some(Self {
                        file: file.into(),
                        first,
                        end,
                    });
                }
            }
        }
        found
    }
}
