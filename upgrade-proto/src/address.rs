//! The address of a service: `/dev/self/fd/<DEC>/<NAME>`.
//!
//! A kernel with fd addresses claims every `AF_UNIX` address that starts with the prefix and a digit;
//! the grammar here is the kernel's, so that a mistake is found before a system call is made.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use crate::Error;
use crate::text::printable;

/// What every address starts with.
pub const PREFIX: &str = "/dev/self/fd/";

/// The longest name of a service, in bytes.
pub const NAME_MAX_BYTES: usize = 64;

/// The name of a service: 1 to 64 printable ASCII characters without `/`, not `.` and not `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Name(String);

impl Name {
    /// Checks a name.
    pub fn new(name: &str) -> Result<Self, Error> {
        let refuse = |why| Error::Name {
            name: printable(name),
            why,
        };
        if name.is_empty() {
            return Err(refuse("it is empty"));
        }
        if name.len() > NAME_MAX_BYTES {
            return Err(refuse("it is longer than 64 bytes"));
        }
        if name == "." || name == ".." {
            return Err(refuse("it means a directory"));
        }
        if !name
            .bytes()
            .all(|byte| (0x21..=0x7e).contains(&byte) && byte != b'/')
        {
            return Err(refuse(
                "only printable ASCII without space and '/' is allowed",
            ));
        }
        Ok(Self(name.to_owned()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::new(text)
    }
}

/// An fd address: a descriptor of the calling process and the name of a service.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct FdAddress {
    fd: RawFd,
    name: Name,
}

impl FdAddress {
    /// The address of the service `name` of the object behind `fd`; a negative descriptor is refused.
    pub fn new(fd: RawFd, name: Name) -> Result<Self, Error> {
        if fd < 0 {
            return Err(Error::Address {
                address: fd.to_string(),
                why: "a descriptor is not negative",
            });
        }
        Ok(Self { fd, name })
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd
    }

    /// The name of the service.
    pub fn name(&self) -> &Name {
        &self.name
    }
}

impl fmt::Display for FdAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}/{}", self.fd, self.name)
    }
}

impl FromStr for FdAddress {
    type Err = Error;

    /// Parses an address as the kernel does; one trailing NUL, as in `sun_path`, is allowed.
    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |why| Error::Address {
            address: printable(text),
            why,
        };
        let address = text.strip_suffix('\0').unwrap_or(text);
        let rest = address
            .strip_prefix(PREFIX)
            .ok_or_else(|| refuse("it does not start with /dev/self/fd/"))?;
        let (digits, name) = rest
            .split_once('/')
            .ok_or_else(|| refuse("no name follows the descriptor"))?;
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(refuse("the descriptor is not a decimal number"));
        }
        if digits.len() > 1 && digits.starts_with('0') {
            return Err(refuse("the descriptor has a leading zero"));
        }
        let fd = digits
            .parse()
            .map_err(|_| refuse("the descriptor is too large"))?;
        Self::new(fd, Name::new(name)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_accepted_exactly_when_the_grammar_says_so() {
        let longest = format!("/dev/self/fd/3/{}", "n".repeat(64));
        let too_long = format!("/dev/self/fd/3/{}", "n".repeat(65));
        let table: &[(&str, Option<(RawFd, &str)>)] = &[
            ("/dev/self/fd/0/a", Some((0, "a"))),
            ("/dev/self/fd/9/vhost-user-blk", Some((9, "vhost-user-blk"))),
            (
                "/dev/self/fd/9/vhost-user-blk\0",
                Some((9, "vhost-user-blk")),
            ),
            ("/dev/self/fd/2147483647/x", Some((i32::MAX, "x"))),
            ("/dev/self/fd/3/...", Some((3, "..."))),
            ("/dev/self/fd/3/!~", Some((3, "!~"))),
            (&longest, Some((3, &longest[15..]))),
            (&too_long, None),
            ("/dev/self/fd/2147483648/x", None),
            ("/dev/self/fd/99999999999999999999/x", None),
            ("/dev/self/fd/-1/x", None),
            ("/dev/self/fd/+1/x", None),
            ("/dev/self/fd/01/x", None),
            ("/dev/self/fd/00/x", None),
            ("/dev/self/fd/0x1/x", None),
            ("/dev/self/fd//x", None),
            ("/dev/self/fd/1", None),
            ("/dev/self/fd/1/", None),
            ("/dev/self/fd/1/.", None),
            ("/dev/self/fd/1/..", None),
            ("/dev/self/fd/1/a/b", None),
            ("/dev/self/fd/1/a b", None),
            ("/dev/self/fd/1/a\x7f", None),
            ("/dev/self/fd/1/\u{e9}", None),
            ("/dev/self/fd/1/a\0\0", None),
            ("/dev/self/fd/pipe:[7]/a", None),
            ("/proc/self/fd/1/a", None),
            ("", None),
        ];
        for (text, expected) in table {
            let parsed = text.parse::<FdAddress>().ok();
            let seen = parsed
                .as_ref()
                .map(|address| (address.fd(), address.name().as_str()));
            assert_eq!(seen, *expected, "{text:?}");
        }
    }

    #[test]
    fn what_is_formatted_is_parsed_back() {
        let name = Name::new("ring-buffer").expect("a valid name");
        let address = FdAddress::new(17, name.clone()).expect("a valid descriptor");
        assert_eq!(address.to_string(), "/dev/self/fd/17/ring-buffer");
        assert_eq!(
            address.to_string().parse::<FdAddress>().expect("parsed"),
            address
        );
        assert!(FdAddress::new(-1, name).is_err());
    }
}
