//! Images whose format would be guessed.

use std::ffi::OsString;

use serde_json::json;

use super::disk::{NODE, blockdev};
use crate::engine::qmp::Qmp;

/// Why the daemon must not serve what it has opened: the format of a backing file was guessed from its first bytes, which a
/// guest may have written, and which then name any file.
pub(super) fn guessed_format(monitor: &mut Qmp, arguments: &[OsString]) -> Option<String> {
    let nodes = match monitor.command("query-named-block-nodes", json!({})) {
        Ok(nodes) => nodes,
        Err(error) => return Some(format!("{error:#}")),
    };
    let nodes = nodes.as_array().map_or(&[][..], Vec::as_slice);
    let options = blockdev(arguments);
    let disk = nodes.iter().find(|node| node["node-name"] == NODE);
    // Those for which the options of the disk say it.
    let mut said = Vec::new();
    let (mut image, mut key) = (
        disk.map(|disk| &disk["image"]),
        String::from("backing.driver"),
    );
    while let Some(one) = image.filter(|image| image.is_object()) {
        if options.contains_key(&key) {
            said.push(&one["filename"]);
        }
        image = Some(&one["backing-image"]);
        key.insert_str(0, "backing.");
    }
    let guessed = nodes.iter().map(|node| &node["image"]).find(|image| {
        image["backing-filename"].is_string()
            && !image["backing-filename-format"].is_string()
            && !said.contains(&&image["filename"])
    })?;
    let name = |key: &str| guessed[key].as_str().unwrap_or("an image").to_owned();
    Some(format!(
        "{} does not say what format its backing file has, and a guest may have made it look like another one: \
         qemu-img rebase -u -F FORMAT -b {} {}",
        name("filename"),
        name("backing-filename"),
        name("filename")
    ))
}
