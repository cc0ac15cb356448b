//! Config fragments, and whether what they ask for survived.
//!
//! The kernel's configuration tool drops an option silently when something it
//! depends on is missing; the lab does not.

use std::collections::BTreeMap;

use anyhow::{Result, bail};

/// The options of a fragment or a finished configuration. `n` stands for
/// "is not set".
pub fn options(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            if let Some(rest) = line.strip_prefix("# CONFIG_") {
                let name = rest.strip_suffix(" is not set")?;
                let start = line.find("CONFIG_")?;
                return Some((&line[start..start + "CONFIG_".len() + name.len()], "n"));
            }
            let (name, value) = line.split_once('=')?;
            name.starts_with("CONFIG_").then_some((name, value))
        })
        .collect()
}

/// Checks that everything the fragment asks for is in the configuration.
pub fn check_survival(fragment: &str, configuration: &str) -> Result<()> {
    let wanted = options(fragment);
    let got = options(configuration);
    let lost: Vec<String> = wanted
        .iter()
        .filter(|(name, value)| got.get(*name).copied().unwrap_or("n") != **value)
        .map(|(name, value)| {
            let got = got.get(name).copied().unwrap_or("n");
            format!("{name}={value} (is {got})")
        })
        .collect();
    if !lost.is_empty() {
        bail!(
            "the kernel's configuration does not have what the fragment asks for: {}; \
             does an option it depends on miss?",
            lost.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINISHED: &str = "\
#
# Automatically generated file; DO NOT EDIT.
#
CONFIG_64BIT=y
CONFIG_NR_CPUS=8
CONFIG_LOCALVERSION=\"-lab\"
# CONFIG_MODULES is not set
CONFIG_BLK_DEV_UBLK=y
";

    #[test]
    fn a_fragment_that_survived_is_accepted() {
        let fragment = "# why\nCONFIG_64BIT=y\nCONFIG_NR_CPUS=8\nCONFIG_MODULES=n\n\
                        CONFIG_LOCALVERSION=\"-lab\"\nCONFIG_NEVER_HEARD_OF=n\n";
        check_survival(fragment, FINISHED).expect("everything is there");
    }

    #[test]
    fn a_dropped_or_changed_option_is_named() {
        let fragment = "CONFIG_NR_CPUS=4\nCONFIG_NINE_P=y\n# CONFIG_BLK_DEV_UBLK is not set\n";
        let error = check_survival(fragment, FINISHED).expect_err("three differ");
        let text = error.to_string();
        for name in [
            "CONFIG_NR_CPUS=4 (is 8)",
            "CONFIG_NINE_P=y (is n)",
            "CONFIG_BLK_DEV_UBLK",
        ] {
            assert!(text.contains(name), "{text}");
        }
    }
}
