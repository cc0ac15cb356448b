//! Reading a system's package sources and deriving others from them.
//!
//! The lab needs a few packages from suites that the system does not have
//! configured. It takes the address and the key from the source that is there,
//! so it works with any mirror and names none.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// One configured source of binary packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// Addresses.
    pub uris: Vec<String>,
    /// Suites.
    pub suites: Vec<String>,
    /// Components.
    pub components: Vec<String>,
    /// Key file (or several), as written.
    pub signed_by: Option<String>,
}

impl Source {
    /// The source as a deb822 stanza.
    #[must_use]
    pub fn stanza(&self) -> String {
        let mut text = String::new();
        let mut field = |name: &str, value: &str| {
            writeln!(text, "{name}: {value}").expect("writing to a String cannot fail");
        };
        field("Types", "deb");
        field("URIs", &self.uris.join(" "));
        field("Suites", &self.suites.join(" "));
        field("Components", &self.components.join(" "));
        if let Some(keys) = &self.signed_by {
            field("Signed-By", keys);
        }
        text
    }
}

/// Reads a deb822 file (`*.sources`).
#[must_use]
pub fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_of(&fields));
            fields.clear();
        } else if line.starts_with([' ', '\t']) {
            // A continued value; embedded keys are multi-line, and a lone dot
            // is an empty line in them.
            if let Some((_, value)) = fields.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_of(fields: &[(String, String)]) -> Option<Source> {
    let get = |name: &str| {
        fields
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    };
    let words = |name: &str| -> Vec<String> {
        get(name)
            .unwrap_or("")
            .split_whitespace()
            .map(str::to_owned)
            .collect()
    };
    if get("enabled").is_some_and(|value| value.eq_ignore_ascii_case("no"))
        || !words("types").iter().any(|kind| kind == "deb")
    {
        return None;
    }
    Some(Source {
        uris: words("uris"),
        suites: words("suites"),
        components: words("components"),
        signed_by: get("signed-by").map(str::to_owned),
    })
}

/// Reads a one-line file (`sources.list`, `*.list`).
#[must_use]
pub fn parse_one_line(text: &str) -> Vec<Source> {
    text.lines().filter_map(one_line).collect()
}

fn one_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or("").trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None;
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(inside) => inside.split_once(']')?,
        None => ("", rest),
    };
    let signed_by = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .map(|keys| keys.replace(',', " "));
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Source {
        uris: vec![words.next()?],
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by,
    })
}

/// Every source configured below `etc` (normally `/etc/apt`).
///
/// # Errors
/// A file that is there cannot be read.
pub fn configured(etc: &Path) -> Result<Vec<Source>> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        let mut parts: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .collect();
        parts.sort();
        files.extend(parts);
    }
    let mut sources = Vec::new();
    for file in files.into_iter().filter(|file| file.exists()) {
        let parse = match file.extension().and_then(|ending| ending.to_str()) {
            Some("sources") => parse_deb822,
            Some("list") => parse_one_line,
            _ => continue,
        };
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        sources.extend(parse(&text));
    }
    Ok(sources)
}

/// The sources of the distribution itself: those that have the release, its
/// updates or its security updates. The first is the one with the release.
///
/// # Errors
/// No source has the release.
pub fn of_release(all: &[Source], codename: &str) -> Result<Vec<Source>> {
    let belongs = |source: &Source| {
        let has_main = source.components.iter().any(|part| part == "main");
        let of_release = |suite: &String| {
            suite.as_str() == codename
                || suite.strip_prefix(codename).is_some_and(|rest| {
                    rest.starts_with("-updates")
                        || rest.starts_with("-security")
                        || rest.starts_with("/updates")
                })
        };
        has_main && source.suites.iter().any(of_release)
    };
    let (mut main, rest): (Vec<Source>, Vec<Source>) = all
        .iter()
        .filter(|source| belongs(source))
        .cloned()
        .partition(|source| source.suites.iter().any(|suite| suite == codename));
    if main.is_empty() {
        bail!("no configured package source has the suite {codename} with the component main");
    }
    main.extend(rest);
    Ok(main)
}

/// A source with the same address and key, but other suites.
#[must_use]
pub fn derive(from: &Source, suites: &[&str]) -> Source {
    Source {
        uris: from.uris.clone(),
        suites: suites.iter().map(|&suite| suite.to_owned()).collect(),
        components: vec!["main".to_owned()],
        signed_by: from.signed_by.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# a comment
Types: deb deb-src
# another
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/key.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abcdef
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://other.example/node
Suites: nodistro
Components: main
";

    #[test]
    fn a_deb822_source_is_derived_with_address_and_key() {
        let all = parse_deb822(DEB822);
        assert_eq!(all.len(), 3);
        let release = of_release(&all, "bookworm").expect("it is there");
        assert_eq!(release.len(), 2);
        let derived = derive(&release[0], &["bookworm-backports", "trixie-backports"]);
        assert_eq!(
            derived.stanza(),
            "Types: deb\n\
             URIs: http://mirror.example/debian\n\
             Suites: bookworm-backports trixie-backports\n\
             Components: main\n\
             Signed-By: /usr/share/keyrings/key.gpg\n"
        );
    }

    #[test]
    fn an_embedded_key_survives() {
        let all = parse_deb822(DEB822);
        let again = parse_deb822(&all[1].stanza());
        assert_eq!(again, [all[1].clone()]);
        assert!(all[1].stanza().contains("\n .\n abcdef\n"));
    }

    #[test]
    fn a_one_line_source_is_understood() {
        let text = "\
# deb http://off.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/k/a.gpg,/k/b.gpg] http://mirror.example/debian bookworm main contrib # why
deb http://security.example/ bookworm-security main
deb http://broken.example
";
        let all = parse_one_line(text);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].signed_by.as_deref(), Some("/k/a.gpg /k/b.gpg"));
        assert_eq!(all[0].components, ["main", "contrib"]);
        let release = of_release(&all, "bookworm").expect("it is there");
        assert_eq!(release[0].uris, ["http://mirror.example/debian"]);
        assert_eq!(release.len(), 2);
        assert!(of_release(&all, "trixie").is_err());
    }

    #[test]
    fn both_kinds_of_files_are_found() {
        let etc = tempfile::tempdir().expect("a temporary directory");
        let parts = etc.path().join("sources.list.d");
        fs::create_dir(&parts).expect("a directory");
        fs::write(parts.join("a.sources"), DEB822).expect("a file");
        fs::write(parts.join("b.list"), "deb http://b.example x main\n").expect("a file");
        fs::write(parts.join("c.save"), "deb http://c.example x main\n").expect("a file");
        let all = configured(etc.path()).expect("readable");
        assert_eq!(all.len(), 4);
    }
}
