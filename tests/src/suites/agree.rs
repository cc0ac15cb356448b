//! Both doors of one server say the same about the disk behind them.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::kit::sysfs::Sysfs;
use crate::test;
use crate::test::{Context, Test};

/// The table.
pub const TESTS: &[Test] = &[test!(the_doors_agree_on_every_kind_of_disk)];

/// What a door says about its disk.
#[derive(Debug, PartialEq, Eq)]
struct Facts {
    size_bytes: u64,
    block_bytes: u64,
    physical_block_bytes: u64,
    read_only: bool,
    write_cache: bool,
    max_discard_bytes: u64,
    discard_granularity_bytes: u64,
    max_write_zeroes_bytes: u64,
}

fn the_doors_agree_on_every_kind_of_disk(cx: &Context) -> Result<()> {
    let file = cx.file((64 << 20) + 4096)?;
    let cases: [(String, bool, u64); 7] = [
        ("mem:64M".into(), false, 512),
        ("mem:64M,block-size=4096,serial=S-1".into(), false, 4096),
        ("null:16T".into(), false, 512),
        // 2^63 - 4096: there is no larger disk.
        ("null:9223372036854771712".into(), false, 512),
        (format!("{file},cache=buffered"), true, 512),
        (format!("{file},cache=buffered,block-size=4096"), true, 4096),
        (format!("{file},read-only"), true, 512),
    ];
    for (spec, write_cache, block_bytes) in cases {
        agree(cx, &spec, write_cache, block_bytes).with_context(|| spec.clone())?;
    }
    Ok(())
}

fn agree(cx: &Context, spec: &str, write_cache: bool, block_bytes: u64) -> Result<()> {
    let socket = cx.scratch().join("disk.sock");
    let server = cx
        .serve()
        .ublk("yes")
        .name("disk")
        .vhost_socket(&socket)
        .arg(spec)
        .start()?;
    let block = block_facts(&server.block_device()?)?;
    let vhost = vhost_facts(&socket)?;
    ensure!(
        block == vhost,
        "the ublk door says {block:?}, the vhost door {vhost:?}"
    );
    // And what they say is what was asked for.
    ensure!(block.write_cache == write_cache, "{block:?}");
    ensure!(block.read_only == spec.contains("read-only"), "{block:?}");
    ensure!(block.block_bytes >= block_bytes, "{block:?}");
    let stat = cx.stat("disk")?;
    ensure!(stat["size_bytes"] == block.size_bytes, "{stat}");
    ensure!(stat["block_bytes"] == block.block_bytes, "{stat}");
    ensure!(stat["write_cache"] == block.write_cache, "{stat}");
    server.stop().map(drop)
}

/// What the kernel made of the ublk door.
fn block_facts(device: &Path) -> Result<Facts> {
    let disk = Sysfs::of(device)?;
    let max_discard_bytes = disk.number("queue/discard_max_bytes")?;
    Ok(Facts {
        size_bytes: disk.size_bytes()?,
        block_bytes: disk.number("queue/logical_block_size")?,
        physical_block_bytes: disk.number("queue/physical_block_size")?,
        read_only: disk.number("ro")? == 1,
        write_cache: disk.get("queue/write_cache")? == "write back",
        max_discard_bytes,
        discard_granularity_bytes: match max_discard_bytes {
            0 => 0,
            _ => disk.number("queue/discard_granularity")?,
        },
        max_write_zeroes_bytes: disk.number("queue/write_zeroes_max_bytes")?,
    })
}

/// What a front-end hears at the vhost door: features and configuration space (virtio 1.3, 5.2.4).
fn vhost_facts(socket: &Path) -> Result<Facts> {
    let mut frontend = Frontend::connect(socket, 1)?;
    frontend.set_owner()?;
    let features = frontend.get_features()?;
    let protocol = frontend.get_protocol_features()?;
    ensure!(
        protocol.contains(VhostUserProtocolFeatures::CONFIG),
        "no configuration space"
    );
    frontend.set_protocol_features(VhostUserProtocolFeatures::CONFIG)?;
    frontend.set_features(features)?;
    let (_, space) = frontend.get_config(0, 60, VhostUserConfigFlags::WRITABLE, &[0; 60])?;
    let bytes = |at: usize, len: usize| {
        let mut word = [0u8; 8];
        word[..len].copy_from_slice(&space[at..at + len]);
        u64::from_le_bytes(word)
    };
    let has = |bit: u32| features & (1 << bit) != 0;
    let (flush, config_wce) = (has(9), has(11));
    ensure!(
        flush == config_wce,
        "FLUSH {flush}, CONFIG_WCE {config_wce}"
    );
    let (discard, write_zeroes) = (has(13), has(14));
    let block_bytes = bytes(20, 4);
    let if_offered = |offered: bool, value: u64| if offered { value } else { 0 };
    Ok(Facts {
        size_bytes: bytes(0, 8) * 512,
        block_bytes,
        physical_block_bytes: block_bytes << bytes(24, 1),
        read_only: has(5),
        write_cache: flush && bytes(32, 1) == 1,
        max_discard_bytes: if_offered(discard, bytes(36, 4) * 512),
        discard_granularity_bytes: if_offered(discard, bytes(44, 4) * 512),
        max_write_zeroes_bytes: if_offered(write_zeroes, bytes(48, 4) * 512),
    })
}
