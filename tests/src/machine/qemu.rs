//! QEMU without hardware help: an emulated PC, slow and exact.

use std::ffi::OsString;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{ChannelEnd, Hypervisor, Mode, Mount, RunDir, SETUP_VARIABLE, Setup};
use crate::test::Place;

/// Which of QEMU's boards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Board {
    /// A PC with PCI.
    Q35,
    /// The minimal board with virtio-mmio.
    Microvm,
}

impl Board {
    /// The ending of virtio device names on this board.
    fn bus(self) -> &'static str {
        match self {
            Board::Q35 => "pci",
            Board::Microvm => "device",
        }
    }
}

/// An emulated PC.
#[derive(Clone, Debug)]
pub struct Qemu {
    kernel: PathBuf,
    initramfs: Option<PathBuf>,
    board: Board,
    processors: u32,
    memory_mib: u32,
    vhost_sockets: Vec<PathBuf>,
    arguments: Vec<String>,
    recipe: Option<PathBuf>,
    environment: Vec<(OsString, OsString)>,
}

impl Qemu {
    /// A q35 PC with two processors, 2 GiB and no disks.
    pub fn new(kernel: &Path) -> Self {
        Qemu {
            kernel: kernel.to_owned(),
            initramfs: None,
            board: Board::Q35,
            processors: 2,
            memory_mib: 2048,
            vhost_sockets: Vec::new(),
            arguments: Vec::new(),
            recipe: None,
            environment: Vec::new(),
        }
    }

    /// What the kernel starts with, if it needs modules.
    pub fn initramfs(mut self, file: &Path) -> Self {
        self.initramfs = Some(file.to_owned());
        self
    }

    /// Starts QEMU through a script of `qemu-config/`, which brings board, memory and disks itself.
    pub fn recipe(mut self, script: &Path) -> Self {
        self.recipe = Some(script.to_owned());
        self
    }

    /// A small guest whose disk is a vhost-user-blk socket: one processor,
    /// 512 MiB of shared memory, as many queues as QEMU chooses.
    pub fn client(kernel: &Path, socket: &Path) -> Self {
        Qemu::new(kernel)
            .processors(1)
            .memory_mib(512)
            .vhost_disk(socket)
    }

    /// Sets an environment variable of the recipe.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The board.
    pub fn board(mut self, board: Board) -> Self {
        self.board = board;
        self
    }

    /// The number of processors.
    pub fn processors(mut self, processors: u32) -> Self {
        self.processors = processors;
        self
    }

    /// The guest's memory.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Adds a vhost-user-blk disk: the first is `/dev/vda`.
    pub fn vhost_disk(mut self, socket: &Path) -> Self {
        self.vhost_sockets.push(socket.to_owned());
        self
    }

    /// One more word for QEMU's command line.
    pub fn argument(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Board, memory and disks as a script of `qemu-config/` brings them.
    fn recipe_command(&self, script: &Path) -> Result<Command> {
        let mut command = Command::new(script);
        match &self.vhost_sockets[..] {
            [] => {}
            [socket] => {
                command.env("SOCKET", socket);
            }
            _ => bail!("a recipe has one vhost-user-blk disk"),
        }
        command
            .env("MEMORY", format!("{}M", self.memory_mib))
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Board, memory and disks, option by option.
    fn plain_command(&self) -> Command {
        let mut command = Command::new("qemu-system-x86_64");
        command
            .arg("-m")
            .arg(format!("{}M", self.memory_mib))
            // Shared, because vhost-user servers map the guest's memory.
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=memory,share=on,size={}M",
                self.memory_mib
            ));
        match self.board {
            Board::Q35 => command.args(["-machine", "q35,memory-backend=memory"]),
            Board::Microvm => command
                .args(["-machine", "microvm,memory-backend=memory,rtc=on"])
                // vhost-user servers speak virtio 1 only; the board's default
                // is the version before.
                .args(["-global", "virtio-mmio.force-legacy=false"]),
        };
        for (index, disk) in self.vhost_sockets.iter().enumerate() {
            command
                .arg("-chardev")
                .arg(format!("socket,id=disk{index},path={}", disk.display()))
                .arg("-device")
                .arg(match self.board {
                    Board::Q35 => format!("vhost-user-blk-pci,chardev=disk{index}"),
                    Board::Microvm => format!("vhost-user-blk,chardev=disk{index}"),
                });
        }
        command
    }

    fn kernel_command_line(&self, run: &RunDir, mode: &Mode) -> String {
        let mut words = vec![
            "console=ttyS0".to_owned(),
            "root=root".to_owned(),
            "rootfstype=9p".to_owned(),
            "rootflags=trans=virtio,version=9p2000.L,msize=512000,cache=loose".to_owned(),
            "ro".to_owned(),
            "panic=-1".to_owned(),
            "oops=panic".to_owned(),
            "reboot=t".to_owned(),
            "printk.devkmsg=on".to_owned(),
            format!("init={}", run.init().display()),
            format!("{SETUP_VARIABLE}={}", run.setup().display()),
        ];
        if *mode != Mode::Agent {
            words.push("quiet".to_owned());
        }
        // An emulator that is not scheduled in time (in User Mode Linux always)
        // makes every clock but the processor's counter useless for measuring
        // that counter by: a microvm without a known frequency waits for its
        // first tick for ever, and a PC takes the counter for broken, and from
        // then on reads a slow device each time it wants to know the time.
        words.push(format!("tsc_early_khz={}", counter_khz()));
        words.push("tsc=reliable".to_owned());
        words.join(" ")
    }
}

impl Hypervisor for Qemu {
    fn name(&self) -> &'static str {
        match self.board {
            Board::Q35 => "q35",
            Board::Microvm => "microvm",
        }
    }

    fn place(&self) -> Place {
        Place::Vm
    }

    fn boot_limit(&self) -> Duration {
        Duration::from_secs(180)
    }

    fn setup(&self, _run: &RunDir, mode: Mode) -> Setup {
        Setup {
            place: Place::Vm,
            mode,
            exchange: Mount {
                kind: "9p".into(),
                source: "exchange".into(),
                options: "trans=virtio,version=9p2000.L,msize=512000,cache=none".into(),
            },
            channel: "/dev/vport*".into(),
            powers_off: false,
            keep: Vec::new(),
        }
    }

    fn command(&self, run: &RunDir, mode: &Mode) -> Result<(Command, ChannelEnd)> {
        let bus = self.board.bus();
        let socket = run.file("channel.sock");
        let listener = UnixListener::bind(&socket)
            .with_context(|| format!("cannot listen on {}", socket.display()))?;
        let mut command = match &self.recipe {
            Some(script) => self.recipe_command(script)?,
            None => self.plain_command(),
        };
        command
            .args(["-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-no-reboot", "-accel", "tcg,thread=multi", "-cpu", "max"])
            .arg("-smp")
            .arg(self.processors.to_string());
        for (tag, path, extra) in [
            ("root", PathBuf::from("/"), ",readonly=on"),
            ("exchange", run.exchange(), ""),
        ] {
            command
                .arg("-fsdev")
                .arg(format!(
                    "local,id={tag},path={},security_model=none,multidevs=remap{extra}",
                    path.display()
                ))
                .arg("-device")
                .arg(format!("virtio-9p-{bus},fsdev={tag},mount_tag={tag}"));
        }
        command
            .arg("-device")
            .arg(format!("virtio-serial-{bus}"))
            .arg("-chardev")
            .arg(format!("socket,id=channel,path={}", socket.display()))
            .args(["-device", "virtserialport,chardev=channel,name=lab"])
            .arg("-device")
            .arg(format!("virtio-rng-{bus}"));
        command
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-append")
            .arg(self.kernel_command_line(run, mode))
            .args(&self.arguments);
        if let Some(initramfs) = &self.initramfs {
            command.arg("-initrd").arg(initramfs);
        }
        match mode {
            Mode::Agent => {
                command
                    .args(["-chardev", "file,id=console,path=/dev/stderr,append=on"])
                    .args(["-serial", "chardev:console"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null());
            }
            Mode::Shell(_) => {
                command
                    .args(["-chardev", "stdio,id=console,signal=off"])
                    .args(["-serial", "chardev:console"])
                    .stdin(Stdio::inherit())
                    .stdout(Stdio::inherit())
                    .stderr(Stdio::inherit());
            }
        }
        Ok((command, ChannelEnd::Listening(listener)))
    }
}

/// The frequency of the processor's time stamp counter, which QEMU's emulated
/// processors show unchanged.
fn counter_khz() -> u64 {
    let read = || {
        // SAFETY: reads a register; every x86-64 processor has it.
        unsafe { std::arch::x86_64::_rdtsc() }
    };
    let (started, first) = (Instant::now(), read());
    std::thread::sleep(Duration::from_millis(50));
    let (elapsed, ticks) = (started.elapsed(), read().wrapping_sub(first));
    let micros = u64::try_from(elapsed.as_micros())
        .unwrap_or(u64::MAX)
        .max(1);
    ticks.saturating_mul(1000) / micros
}
