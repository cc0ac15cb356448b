//! What a QEMU command line says about the guest's memory and board. A vhost-user server maps the guest's memory, so
//! all of it must be in shared memory backends.

use std::collections::BTreeMap;

use super::words::pairs;

/// How disks are attached to the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// PCI or PCI Express.
    Pci,
    /// virtio-mmio: microvm.
    Mmio,
}

/// What matters here of a command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Board {
    /// The bus for disks.
    pub bus: Bus,
    /// What has to be added so that a vhost-user server can map the guest's memory.
    pub shared_memory: Vec<String>,
    /// Whether QEMU's firmware for microvm is to find something to boot. It has its stack and buffers in the
    /// memory of the firmware itself, which no server can map, so it finds no vhost-user disk readable and hangs.
    pub boots_by_mmio_firmware: bool,
}

/// The name of the memory backend that is added.
const BACKEND: &str = "ublkup-memory";

/// QEMU's memory size by default.
const DEFAULT_SIZE: &str = "128M";

/// Options whose value may look like an option.
const VERBATIM: [&str; 4] = ["append", "name", "fw_cfg", "smbios"];

/// Options that the launcher does not work with.
const REFUSED: [(&str, &str); 3] = [
    (
        "mem-path",
        "makes memory that is not shared: give an -object memory-backend-file,id=…,mem-path=…,size=…,share=on \
         and name it with -machine memory-backend=…",
    ),
    (
        "readconfig",
        "hides options that matter here (memory, machine): write them on the command line",
    ),
    (
        "daemonize",
        "would leave the launcher behind: run the launcher itself in the background",
    ),
];

/// Reads the words after QEMU's name.
///
/// # Errors
///
/// When they cannot be read or exclude vhost-user; the text says what to write instead.
pub fn parse_command_line(words: &[String]) -> Result<Board, String> {
    let mut seen = Seen::default();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let Some(option) = option_name(word) else {
            continue;
        };
        let mut value = || {
            let value = rest.next();
            value.ok_or_else(|| format!("{word} has no value"))
        };
        match option {
            "M" | "machine" => merge(&mut seen.machine, value()?, "type"),
            "m" => merge(&mut seen.memory, value()?, "size"),
            "object" => seen.object(value()?)?,
            "numa" => seen.numa(value()?)?,
            "device" => seen.device(value()?),
            "global" => seen.globals.push(value()?.clone()),
            "kernel" | "bios" => seen.boots_otherwise = true,
            option if VERBATIM.contains(&option) => {
                value()?;
            }
            option => {
                let refused = REFUSED.iter().find(|(refused, _)| *refused == option);
                if let Some((_, why)) = refused {
                    return Err(format!("-{option} {why}"));
                }
            }
        }
    }
    let bus = seen.bus();
    let mut shared_memory = Vec::new();
    let mut globals = seen.globals.iter();
    let says_version = globals.any(|global| global.contains("virtio-mmio.force-legacy"));
    if bus == Bus::Mmio && !says_version {
        // vhost-user servers speak virtio 1; the board's default is the version before.
        shared_memory.extend(["-global", "virtio-mmio.force-legacy=false"].map(str::to_owned));
    }
    shared_memory.extend(seen.missing_memory()?);
    Ok(Board {
        bus,
        shared_memory,
        boots_by_mmio_firmware: bus == Bus::Mmio && !seen.boots_otherwise,
    })
}

/// `-m` and `--m` are the same option.
fn option_name(word: &str) -> Option<&str> {
    let name = word.strip_prefix('-')?;
    let name = name.strip_prefix('-').unwrap_or(name);
    (!name.is_empty()).then_some(name)
}

/// An option that may be given several times: later keys win.
fn merge(into: &mut BTreeMap<String, String>, text: &str, first: &str) {
    into.extend(pairs(text, first));
}

#[derive(Debug, Default)]
struct Seen {
    machine: BTreeMap<String, String>,
    memory: BTreeMap<String, String>,
    /// Memory backends: id → shared.
    backends: BTreeMap<String, bool>,
    /// Backends that the guest's memory comes from, with the option that says so.
    used: Vec<(String, &'static str)>,
    nodes_without_memory: bool,
    globals: Vec<String>,
    /// There is a kernel, or other firmware.
    boots_otherwise: bool,
}

impl Seen {
    fn object(&mut self, value: &str) -> Result<(), String> {
        let options: BTreeMap<String, String> = if value.starts_with('{') {
            let json: BTreeMap<String, serde_json::Value> = serde_json::from_str(value)
                .map_err(|error| format!("cannot read -object {value}: {error}"))?;
            let plain = |(key, value): (String, serde_json::Value)| match value {
                serde_json::Value::String(text) => (key, text),
                other => (key, other.to_string()),
            };
            json.into_iter().map(plain).collect()
        } else {
            pairs(value, "qom-type").into_iter().collect()
        };
        let kind = options.get("qom-type").map_or("", String::as_str);
        let Some(kind) = kind.strip_prefix("memory-backend-") else {
            return Ok(());
        };
        let shared_by_default = matches!(kind, "memfd" | "shm");
        let shared = options.get("share").map_or(shared_by_default, |share| {
            matches!(share.as_str(), "on" | "true" | "yes" | "y")
        });
        let id = options.get("id").cloned().unwrap_or_default();
        self.backends.insert(id, shared);
        Ok(())
    }

    fn numa(&mut self, value: &str) -> Result<(), String> {
        let options: BTreeMap<_, _> = pairs(value, "type").into_iter().collect();
        if options.get("type").map(String::as_str) != Some("node") {
            return Ok(());
        }
        if options.contains_key("mem") {
            return Err(
                "-numa node,mem=… makes memory that is not shared: give an -object \
                        memory-backend-memfd,id=…,size=…,share=on and -numa node,memdev=…"
                    .into(),
            );
        }
        match options.get("memdev") {
            Some(id) => self.used.push((id.clone(), "-numa node,memdev")),
            None => self.nodes_without_memory = true,
        }
        Ok(())
    }

    /// Memory that is plugged in (`-device pc-dimm,memdev=…`) is the guest's like any other.
    fn device(&mut self, value: &str) {
        let mut options = pairs(value, "driver").into_iter();
        if let Some((_, id)) = options.find(|(key, _)| key == "memdev") {
            self.used.push((id, "-device …,memdev"));
        }
    }

    fn bus(&self) -> Bus {
        let is = |key: &str, wanted: &str| self.machine.get(key).is_some_and(|it| it == wanted);
        match is("type", "microvm") && !is("pcie", "on") {
            true => Bus::Mmio,
            false => Bus::Pci,
        }
    }

    /// The options for a shared memory backend; none if the command line has one.
    fn missing_memory(&self) -> Result<Vec<String>, String> {
        let machine = self.machine.get("memory-backend");
        let machine = machine.map(|id| (id.clone(), "-machine memory-backend"));
        for (id, option) in machine.iter().chain(&self.used) {
            let Some(is_shared) = self.backends.get(id) else {
                return Err(format!(
                    "{option}={id}: there is no -object memory-backend-…,id={id}"
                ));
            };
            if !is_shared {
                return Err(format!(
                    "memory backend '{id}' is not shared, and the server must map the \
                     guest's memory: add share=on to its -object"
                ));
            }
        }
        let mut used = self.used.iter();
        let by_node = used.any(|(_, option)| option.starts_with("-numa"));
        if machine.is_some() || (by_node && !self.nodes_without_memory) {
            return Ok(Vec::new());
        }
        if by_node || self.nodes_without_memory {
            return Err(
                "-numa node without memory: give each node a memdev= whose backend has \
                        share=on"
                    .into(),
            );
        }
        if self.backends.contains_key(BACKEND) {
            return Err(format!(
                "-object …,id={BACKEND} is not used: name it with -machine memory-backend={BACKEND}"
            ));
        }
        let size = self.memory.get("size").map_or(DEFAULT_SIZE, String::as_str);
        let unit = match size.ends_with(|last: char| last.is_ascii_digit()) {
            true => "M",
            false => "",
        };
        Ok(vec![
            "-object".into(),
            format!("memory-backend-memfd,id={BACKEND},size={size}{unit},share=on"),
            "-machine".into(),
            format!("memory-backend={BACKEND}"),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    fn added(line: &str) -> Result<String, String> {
        parse_command_line(&words(line)).map(|board| board.shared_memory.join(" "))
    }

    fn memfd(size: &str) -> String {
        format!(
            "-object memory-backend-memfd,id=ublkup-memory,size={size},share=on \
             -machine memory-backend=ublkup-memory"
        )
    }

    #[test]
    fn memory_is_added_in_the_size_that_was_asked_for() {
        for (line, size) in [
            ("", "128M"),
            ("-m 512", "512M"),
            ("-m 4G", "4G"),
            ("--m 2G", "2G"),
            ("-m size=3G,slots=2,maxmem=8G", "3G"),
            ("-m 1G -m slots=2", "1G"),
            ("-machine q35 -m 1.5G -append -m", "1.5G"),
            ("-object rng-random,id=r -m 64", "64M"),
        ] {
            assert_eq!(added(line).unwrap(), memfd(size), "{line}");
        }
    }

    #[test]
    fn memory_that_is_shared_already_is_left_alone() {
        for line in [
            "-m 1G -object memory-backend-memfd,id=a,size=1G -machine q35,memory-backend=a",
            "-object memory-backend-file,id=a,size=1G,mem-path=/dev/shm,share=on -M memory-backend=a",
            "-object {\"qom-type\":\"memory-backend-ram\",\"id\":\"a\",\"share\":true} -M memory-backend=a",
            "-object memory-backend-shm,id=a,size=1G -numa node,memdev=a",
        ] {
            assert_eq!(added(line).unwrap(), "", "{line}");
        }
    }

    #[test]
    fn memory_that_cannot_be_shared_is_refused_with_the_remedy() {
        for (line, says) in [
            (
                "-object memory-backend-ram,id=a,size=1G -M memory-backend=a",
                "'a' is not shared",
            ),
            (
                "-object memory-backend-memfd,id=a,size=1G,share=off -numa node,memdev=a",
                "'a' is not shared",
            ),
            (
                "-m 1G,slots=1 -object memory-backend-ram,id=d,size=1G -device pc-dimm,memdev=d",
                "'d' is not shared",
            ),
            ("-M q35,memory-backend=a", "no -object"),
            ("-mem-path /dev/hugepages", "memory-backend-file"),
            ("-numa node,mem=1G", "memdev="),
            ("-numa node -m 1G", "memdev="),
            ("-readconfig /etc/guest.cfg", "command line"),
            ("-daemonize", "background"),
            ("-m", "no value"),
        ] {
            let error = added(line).unwrap_err();
            assert!(error.contains(says), "{line}: {error}");
        }
    }

    #[test]
    fn the_board_decides_about_the_bus() {
        for (line, bus) in [
            ("", Bus::Pci),
            ("-machine q35,accel=kvm", Bus::Pci),
            ("-M microvm,rtc=on", Bus::Mmio),
            ("-machine type=microvm", Bus::Mmio),
            ("-M microvm -machine pcie=on", Bus::Pci),
        ] {
            assert_eq!(parse_command_line(&words(line)).unwrap().bus, bus, "{line}");
        }
        for (line, hangs) in [
            ("-M microvm", true),
            ("-M microvm -kernel vmlinux -append x", false),
            ("-M microvm --bios other.bin", false),
            ("-M microvm,pcie=on", false),
            ("-M q35", false),
        ] {
            let board = parse_command_line(&words(line)).unwrap();
            assert_eq!(board.boots_by_mmio_firmware, hangs, "{line}");
        }
        let own = "-M microvm -global virtio-mmio.force-legacy=false";
        assert!(!added(own).unwrap().contains("-global"));
        assert!(
            added("-M microvm")
                .unwrap()
                .starts_with("-global virtio-mmio.force-legacy=false")
        );
    }
}
