//! The man pages of commands: what clap knows, and what it does not: examples, files, environment, exit status, signals.

use std::fs;
use std::io;
use std::path::Path;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

/// A list of terms and what they mean.
type Terms = &'static [(&'static str, &'static str)];

/// What a page has beyond clap's text.
struct Page {
    /// The command, as in the name of its page.
    name: &'static str,
    /// What each example does, and its lines.
    examples: &'static [(&'static str, &'static [&'static str])],
    /// Beyond 0, 1 and 2, which all commands have.
    exit_status: Terms,
}

const PAGES: &[Page] = &[
    Page {
        name: "ublkup",
        examples: &[
            (
                "Serve an image as a block device and to virtual machines:",
                &["ublkup serve disk=/srv/disk.img"],
            ),
            (
                "See what is served, and by whom it is used:",
                &["ublkup list", "ublkup stat disk"],
            ),
            (
                "Run a guest on the disk, past the block layer:",
                &["ublkup qemu /dev/ublkb0 -- qemu-system-x86_64 -machine q35,accel=kvm -m 4G"],
            ),
        ],
        exit_status: &[],
    },
    Page {
        name: "ublkup-serve",
        examples: &[
            ("Serve an image:", &["ublkup serve disk=/srv/disk.img"]),
            (
                "Without root or ublk, for a guest of this user:",
                &["ublkup serve --ublk no disk.img"],
            ),
            (
                "Serve what a configuration file lists, and the others if one cannot start:",
                &["ublkup serve --keep-going --config /etc/ublkup/ublkup.toml"],
            ),
            (
                "Make a file system in an image, and end:",
                &["ublkup serve disk.img --run 'mkfs.ext4 -q $UBLKUP_DEVICE'"],
            ),
            (
                "Replace a running server by a new version; mounts and guests see a pause:",
                &["ublkup serve --take-over disk=/srv/disk.img"],
            ),
        ],
        exit_status: &[(
            "0",
            "ended by a signal, or because its last export was stopped, and no door was lost before; with --run the \
             exit code of the command",
        )],
    },
    Page {
        name: "ublkup-list",
        examples: &[(
            "Name and device of each export:",
            &[r#"ublkup list --json | jq -r '.[] | "\(.name) \(.ublk.device)"'"#],
        )],
        exit_status: &[(
            "1",
            "also if an export is left of a dead server, or does not answer",
        )],
    },
    Page {
        name: "ublkup-stat",
        examples: &[(
            "Counters, once a second, one JSON object in each line:",
            &["ublkup stat disk --json --watch"],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-top",
        examples: &[(
            "The rates of all exports for a minute, in a file:",
            &["timeout 60 ublkup top >rates.txt"],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-metrics",
        examples: &[(
            "For the textfile collector of Prometheus' node exporter, every 15 seconds:",
            &["ublkup metrics >ublkup.prom.new && mv ublkup.prom.new ublkup.prom"],
        )],
        exit_status: &[(
            "0",
            "also if an export has no server, which the metric ublkup_up tells",
        )],
    },
    Page {
        name: "ublkup-events",
        examples: &[(
            "Report failed requests as they happen:",
            &[
                "ublkup events --json | grep --line-buffered '\"event\":\"error\"' | while read -r event; do … done",
            ],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-resize",
        examples: &[(
            "Make the image and the disk larger, then the file system on it:",
            &["ublkup resize disk 20G", "resize2fs /dev/ublkb0"],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-snapshot",
        examples: &[
            (
                "Keep what a disk holds before an upgrade of its guest:",
                &["ublkup snapshot create vm7 /srv/vm7-before.qcow2"],
            ),
            (
                "It went well: the snapshot is not needed any more:",
                &["ublkup snapshot commit vm7 /srv/vm7-before.qcow2"],
            ),
            (
                "It did not: go back, with the guest stopped:",
                &[
                    "ublkup stop vm7",
                    "mv /srv/vm7-before.qcow2 /srv/vm7.qcow2",
                    "ublkup serve vm7=qcow2:/srv/vm7.qcow2",
                ],
            ),
            (
                "Make a backup of a guest that runs:",
                &["ublkup snapshot backup vm7 /backup/vm7.qcow2"],
            ),
        ],
        exit_status: &[(
            "1",
            "failed: the message says whether the disk is as before",
        )],
    },
    Page {
        name: "ublkup-set",
        examples: &[
            (
                "Limit a noisy guest, without a restart:",
                &["ublkup set disk iops-total=1000 bps-total=10M"],
            ),
            (
                "See more of what its server does, for a while:",
                &["ublkup set disk log=debug", "ublkup set disk log=info"],
            ),
        ],
        exit_status: &[],
    },
    Page {
        name: "ublkup-add",
        examples: &[
            (
                "Serve one more image to virtual machines, with the only server that runs:",
                &["ublkup add --ublk no vm8=/srv/vm8.img"],
            ),
            (
                "Choose the server, and give its guest's group the socket:",
                &["ublkup add --server ublkup --vhost-socket-group kvm vm8=/srv/vm8.img"],
            ),
        ],
        exit_status: &[(
            "1",
            "also if some of several exports were not added; the others are",
        )],
    },
    Page {
        name: "ublkup-reload",
        examples: &[(
            "See what a reload would do, and do it:",
            &["ublkup reload --dry-run", "systemctl reload ublkup"],
        )],
        exit_status: &[
            ("0", "the server serves what its configuration says"),
            (
                "1",
                "not all of it could be done, or takes a restart; what could be done is done",
            ),
            (
                "2",
                "wrong usage, or a wrong configuration file: nothing is done",
            ),
        ],
    },
    Page {
        name: "ublkup-stop",
        examples: &[
            ("Stop an export that is not in use:", &["ublkup stop disk"]),
            (
                "Remove the block device that a dead server left; requests that wait for it fail:",
                &["ublkup stop --force disk"],
            ),
        ],
        exit_status: &[(
            "1",
            "also if the export is in use; the message says by what",
        )],
    },
    Page {
        name: "ublkup-recover",
        examples: &[(
            "Go on where a server that was killed ended:",
            &["ublkup recover disk"],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-probe",
        examples: &[(
            "May QEMU have this disk past the block layer?",
            &["ublkup probe /dev/ublkb0"],
        )],
        exit_status: &[("3", "not upgradable; the message says why")],
    },
    Page {
        name: "ublkup-qemu",
        examples: &[
            (
                "Boot a guest from the disk:",
                &[
                    "ublkup qemu /dev/ublkb0,bootindex=1 -- qemu-system-x86_64 -machine q35,accel=kvm -m 4G",
                ],
            ),
            (
                "Print the command, for a script:",
                &["ublkup qemu --print /dev/ublkb0 -- qemu-system-x86_64 -m 4G"],
            ),
            (
                "Move a disk of a running guest, which has unmounted it:",
                &["ublkup qemu --live /run/vm.qmp /dev/ublkb0 --unmounted"],
            ),
        ],
        exit_status: &[
            ("3", "not upgradable (--require-upgrade, --live)"),
            (
                "other",
                "that of QEMU, or 128 and the number of the signal that ended QEMU",
            ),
        ],
    },
    Page {
        name: "ublkup-doctor",
        examples: &[
            (
                "What does this machine lack, and what is left of dead servers?",
                &["ublkup doctor"],
            ),
            ("Remove what is left:", &["ublkup doctor --clean"]),
        ],
        exit_status: &[("1", "also if a check is a problem")],
    },
    Page {
        name: "ublkup-completions",
        examples: &[(
            "Complete commands, options and names of exports in bash:",
            &["ublkup completions bash > /etc/bash_completion.d/ublkup"],
        )],
        exit_status: &[],
    },
    Page {
        name: "ublkup-man",
        examples: &[(
            "Install these pages:",
            &["ublkup man /usr/local/share/man/man1"],
        )],
        exit_status: &[],
    },
];

const EXIT_STATUS: Terms = &[
    ("0", "done"),
    (
        "1",
        "failed; a line on standard error says what failed, on what, and what to do",
    ),
    ("2", "wrong usage: options, SPEC or configuration file"),
];

const FILES: Terms = &[
    (
        "/run/ublkup, $XDG_RUNTIME_DIR/ublkup",
        "the runtime directory of root, of other users: a folder exports/NAME for each export, with its \
         vhost-user-blk socket, its admin socket, and the notes from which the next server recovers",
    ),
    (
        "/etc/ublkup/ublkup.toml",
        "what ublkup.service serves; ublkup.toml(5)",
    ),
    ("/etc/ublkup/NAME.toml", "what ublkup@NAME.service serves"),
    (
        "/dev/disk/by-id/ublkup-NAME",
        "the block device of the export NAME of root, made by the udev rules",
    ),
];

const ENVIRONMENT: Terms = &[
    ("UBLKUP_RUNTIME_DIR", "as --runtime-dir"),
    ("UBLKUP_LOG", "as --log"),
    ("UBLKUP_LOG_FORMAT", "as --log-format"),
    (
        "XDG_RUNTIME_DIR",
        "where the runtime directory of a user other than root is",
    ),
    (
        "NOTIFY_SOCKET",
        "the service manager that is told when all exports are served",
    ),
];

const SIGNALS: Terms = &[
    (
        "SIGTERM, SIGINT",
        "finish what is under way, remove all block devices, whether they are in use or not, and end",
    ),
    (
        "SIGHUP",
        "as SIGTERM, if the server has a terminal; else say in the log that ublkup reload reads the configuration",
    ),
    (
        "a second SIGTERM or SIGINT",
        "end at once, as a crash would",
    ),
    (
        "SIGUSR2",
        "finish what is under way, leave block devices and clients to the next server, and end",
    ),
];

/// Pages that are no command's.
const OTHERS: [(&str, &str); 2] = [
    ("ublkup-admin.7", include_str!("../../man/ublkup-admin.7")),
    (
        "ublkup-upgrade.7",
        include_str!("../../man/ublkup-upgrade.7"),
    ),
];

/// Writes the pages of all commands that are not hidden, and those that are no command's.
pub(super) fn write_pages(command: Command, folder: &Path) -> io::Result<()> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let mut pages = vec![&command];
    while let Some(one) = pages.pop() {
        pages.extend(one.get_subcommands().filter(|one| !one.is_hide_set()));
        let man = Man::new(one.clone());
        fs::write(folder.join(man.get_filename()), page(&man, one)?)?;
    }
    for (name, text) in OTHERS {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}

fn page(man: &Man, command: &Command) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    man.render_options_section(&mut text)?;
    let has_commands = command.has_subcommands();
    if has_commands {
        man.render_subcommands_section(&mut text)?;
    }
    let name = command.get_display_name().unwrap_or(command.get_name());
    let serves = matches!(name, "ublkup" | "ublkup-serve" | "ublkup-recover");
    let mut roff = Roff::new();
    let page = PAGES.iter().find(|page| page.name == name);
    if let Some(page) = page {
        roff.control("SH", ["EXAMPLES"]);
        for (what, lines) in page.examples {
            roff.control("PP", []);
            roff.text([roman(*what)]);
            roff.control("PP", []);
            roff.control("EX", []);
            for line in *lines {
                roff.text([roman(format!("    {line}"))]);
            }
            roff.control("EE", []);
        }
    }
    let own = page.map_or(&[][..], |page| page.exit_status);
    let common = EXIT_STATUS
        .iter()
        .filter(|(code, _)| !own.iter().any(|(other, _)| other == code));
    let mut codes: Vec<_> = common.chain(own).copied().collect();
    codes.sort_by_key(|(code, _)| *code);
    terms(&mut roff, "EXIT STATUS", &codes);
    if serves {
        terms(&mut roff, "FILES", FILES);
        terms(&mut roff, "ENVIRONMENT", ENVIRONMENT);
        terms(&mut roff, "SIGNALS", SIGNALS);
    }
    roff.control("SH", ["SEE ALSO"]);
    roff.text([
        bold("ublkup"),
        roman("(1), "),
        bold("ublkup.toml"),
        roman("(5), "),
        bold("ublkup-upgrade"),
        roman("(7), "),
        bold("ublkup-admin"),
        roman("(7)"),
    ]);
    roff.to_writer(&mut text)?;
    Ok(text)
}

fn terms(roff: &mut Roff, title: &str, terms: &[(&str, &str)]) {
    roff.control("SH", [title]);
    for (term, meaning) in terms {
        roff.control("TP", []);
        roff.text([italic(*term)]);
        roff.text([roman(*meaning)]);
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::command::cli::Cli;

    #[test]
    fn each_command_has_examples_and_each_page_a_command() {
        let mut command = Cli::command().disable_help_subcommand(true);
        command.build();
        let shown = command.get_subcommands().filter(|one| !one.is_hide_set());
        let mut names: Vec<_> = shown
            .filter_map(|one| one.get_display_name())
            .chain(["ublkup"])
            .collect();
        let mut pages: Vec<_> = PAGES.iter().map(|page| page.name).collect();
        names.sort_unstable();
        pages.sort_unstable();
        assert_eq!(names, pages);
    }
}
