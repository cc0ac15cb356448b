//! The documentation holds together.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use testkit::shell::Shell;

use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[
    test!(every_link_to_a_file_leads_somewhere),
    test!(the_libvirt_domain_is_valid),
];

fn the_libvirt_domain_is_valid(cx: &Context) -> Result<()> {
    let domain = cx.paths.repo.join("qemu-config/libvirt.xml");
    Shell::new("virt-xml-validate")
        .arg(&domain)
        .arg("domain")
        .run()?;
    // The schema does not know that a vhost-user disk needs shared memory.
    let text = fs::read_to_string(&domain)?;
    ensure!(
        text.contains("<access mode='shared'/>"),
        "the guest's memory is not shared"
    );
    Ok(())
}

fn every_link_to_a_file_leads_somewhere(cx: &Context) -> Result<()> {
    let mut pages = Vec::new();
    find_pages(&cx.paths.repo, &mut pages)?;
    ensure!(!pages.is_empty(), "there is no documentation");
    let mut broken = Vec::new();
    for page in &pages {
        let text =
            fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))?;
        let dir = page.parent().unwrap_or(&cx.paths.repo);
        for link in file_links(&text) {
            if !dir.join(link).exists() {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
    Ok(())
}

/// The Markdown files below a directory, without build products.
fn find_pages(dir: &Path, pages: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry.with_context(|| format!("cannot list {}", dir.display()))?;
        let path = entry.path();
        let name = entry.file_name();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if name != "target" && name != ".git" {
                find_pages(&path, pages)?;
            }
        } else if path.extension().is_some_and(|ending| ending == "md") {
            pages.push(path);
        }
    }
    Ok(())
}

/// The targets of `[text](target)` that are files, without their anchors.
fn file_links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split([')', ' ']).next())
        .filter(|link| !link.contains("://") && !link.starts_with("mailto:"))
        .filter_map(|link| link.split('#').next())
        .filter(|link| !link.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_files_are_told_from_others() {
        let text = "[a](docs/a.md) [b](https://x.example/) [c](#here) ![d](d.svg \"title\") \
                    [e](../e.md#part)";
        assert_eq!(file_links(text), ["docs/a.md", "d.svg", "../e.md"]);
    }
}
