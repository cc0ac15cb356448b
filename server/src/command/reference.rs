//! The reference of export options, made from their definition: `docs/export-options.md` and ublkup.toml(5).

use clap::builder::PossibleValue;
use clap::{Arg, Args, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::config::ExportOptions;

/// One option.
struct Entry {
    key: String,
    /// What its value is, if it is not one of `choices`.
    value: String,
    /// The values there are, with what each means.
    choices: Vec<(String, String)>,
    help: String,
}

impl Entry {
    fn of(option: &Arg) -> Self {
        let choice = |value: &PossibleValue| {
            let help = value.get_help().map(ToString::to_string);
            (value.get_name().to_owned(), help.unwrap_or_default())
        };
        let names = option.get_value_names().unwrap_or_default();
        Self {
            key: option.get_long().unwrap_or_default().to_owned(),
            value: names.first().map(ToString::to_string).unwrap_or_default(),
            choices: option.get_possible_values().iter().map(choice).collect(),
            help: option
                .get_help()
                .map(ToString::to_string)
                .unwrap_or_default(),
        }
    }

    fn values(&self) -> String {
        match &self.choices[..] {
            [] => self.value.clone(),
            choices => choices
                .iter()
                .map(|(name, _)| name.as_str())
                .collect::<Vec<_>>()
                .join("|"),
        }
    }
}

fn entries() -> Vec<Entry> {
    let command = ExportOptions::augment_args(Command::new("ublkup.toml"));
    command.get_arguments().map(Entry::of).collect()
}

/// A file for ublkup.toml(5).
const EXAMPLE: &str = "\
[defaults]
vhost-socket-group = \"kvm\"

[[export]]
spec = \"vm7=file:/srv/vm7.img\"
iops-total = 2000

[[export]]
spec = \"vm8=qcow2:/srv/vm8.qcow2\"
ublk = \"no\"
";

/// ublkup.toml(5).
pub fn man_page() -> Vec<u8> {
    let command = Command::new("ublkup.toml")
        .about("configuration file of ublkup serve")
        .version(env!("CARGO_PKG_VERSION"));
    let man = Man::new(command).section("5").title("UBLKUP.TOML");
    let mut page = Vec::new();
    let mut roff = Roff::new();
    roff.control("SH", ["DESCRIPTION"]);
    roff.text([
        roman("A TOML file for "),
        bold("ublkup serve --config"),
        roman(
            " with one [[export]] table for each export. Its key spec is KIND:ARG as on the command line, and \
             required; its other keys are below. Those in [defaults] are for all exports. Relative paths are relative \
             to the folder of the file. What is nearer to the export wins: a key of the SPEC over one of the [[export]] table, \
             that over [defaults], and those over the command line.",
        ),
    ]);
    roff.control("SH", ["EXAMPLE"]);
    roff.control("EX", []);
    for line in EXAMPLE.lines() {
        roff.text([roman(format!("    {line}"))]);
    }
    roff.control("EE", []);
    roff.control("SH", ["KEYS"]);
    for entry in entries() {
        roff.control("TP", []);
        roff.text([bold(&entry.key), roman(" = "), italic(entry.values())]);
        roff.text([roman(&entry.help)]);
        for (name, help) in &entry.choices {
            roff.control("br", []);
            roff.text([italic(name), roman(format!(": {help}"))]);
        }
    }
    roff.control("SH", ["FILES"]);
    roff.text([roman(
        "/etc/ublkup/ublkup.toml and, beside it, exports.d/*.toml: what ublkup.service serves; /etc/ublkup/NAME.toml: what \
         ublkup@NAME.service serves",
    )]);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([
        bold("ublkup-serve"),
        roman("(1), "),
        bold("ublkup-reload"),
        roman("(1)"),
    ]);
    // Writing to memory does not fail.
    let _ = man.render_title(&mut page);
    let _ = man.render_name_section(&mut page);
    let _ = roff.to_writer(&mut page);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/export-options.md");

    const HEAD: &str = "\
# Options of an export

Each of them is an option of `ublkup serve` (`--queues 2`), a key of a SPEC (`mem:1G,queues=2`), and a key of `[defaults]`
and `[[export]]` in a configuration file (`queues = 2`). A key of the SPEC has precedence over one of the `[[export]]`
table, that over `[defaults]`, and those over the command line. A switch alone means on (`--read-only`,
`mem:1G,read-only`); in a file it is `true` or `false`. SPECs with `file:` also have the keys
`cache=auto|direct|buffered` and `format=raw`, those with `rbd:` the keys `conf=FILE` and `user=NAME`.

This page is made from the definition of the options: `UPDATE_DOCS=1 cargo test -p ublkup --lib reference`.

";

    fn page() -> String {
        let mut page = HEAD.to_owned();
        for entry in entries() {
            page += &format!(
                "- **`{}`** = `{}`  \n  {}\n",
                entry.key,
                entry.values(),
                entry.help
            );
            for (name, help) in &entry.choices {
                page += &format!("  - `{name}`: {help}\n");
            }
        }
        page
    }

    #[test]
    fn the_page_of_options_is_up_to_date() {
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(PAGE, page()).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(PAGE).unwrap(),
            page(),
            "run it with UPDATE_DOCS=1"
        );
    }

    #[test]
    fn each_option_is_an_imperative_and_names_its_default() {
        for entry in entries() {
            assert!(
                entry.help.contains("[default: "),
                "{}: {}",
                entry.key,
                entry.help
            );
            assert!(
                entry.choices.iter().all(|(_, help)| !help.is_empty()),
                "{}",
                entry.key
            );
        }
    }

    #[test]
    fn the_man_page_has_each_option() {
        let page = String::from_utf8(man_page()).unwrap();
        for entry in entries() {
            let key = entry.key.replace('-', "\\-");
            assert!(page.contains(&format!("\\fB{key}\\fR = ")), "{key}: {page}");
        }
    }
}
