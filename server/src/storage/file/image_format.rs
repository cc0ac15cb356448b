//! Image formats that a file served as it is may turn out to have.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a file holds, as the operator says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ImageFormat {
    /// The disk itself, whatever its first sector looks like
    Raw,
}

/// The first bytes of a format: where they are, the bytes, its name.
const MAGIC: [(usize, &[u8], &str); 10] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
];

/// The format whose header a file begins with, as `qemu-img` calls it.
fn recognize(first: &[u8]) -> Option<&'static str> {
    let has = |at: usize, magic: &[u8]| first.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let found = MAGIC.iter().find(|(at, magic, _)| has(*at, magic));
    found.map(|(_, _, format)| *format)
}

/// Warns of a file that looks like an image of another format: a guest would see the image's headers as its disk, and
/// destroy the image with its first writes.
pub(super) fn warn_unless_raw(file: &fs::File, path: &Path) {
    let mut first = [0; 512];
    // Opening goes on, and finds out what is wrong with a file that cannot be read.
    let read = file.read_at(&mut first, 0).unwrap_or(0);
    if let Some(format) = recognize(&first[..read]) {
        let path = path.display();
        let instead = match format {
            "qcow2" => format!("qcow2:{path}"),
            _ => format!("qemu:driver={format},file.driver=file,file.filename={path}"),
        };
        tracing::warn!(
            "{path}: it looks like a {format} image and is served as it is: guests see its headers instead of the \
             disk in it, and destroy it when they write; serve {instead}, or say format=raw if these bytes are the disk"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_recognized_by_their_first_bytes_and_nothing_else_is() {
        for (at, magic, format) in MAGIC {
            let mut first = vec![0; at];
            first.extend(magic);
            first.resize(512, 0);
            assert_eq!(recognize(&first), Some(format));
            first[at] ^= 1;
            assert_eq!(recognize(&first), None, "{format}");
            assert_eq!(recognize(&first[..at]), None, "{format}, cut off");
        }
        // A boot sector.
        assert_eq!(recognize(&[0xeb, 0x63, 0x90]), None);
    }
}
