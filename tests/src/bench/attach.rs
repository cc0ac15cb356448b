//! Client processes (see [`super::client`]) from the outside.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testkit::shell::{Running, Shell, last_lines};

use super::client::{Answer, End, Order, SUBCOMMAND};

/// A client at work.
#[derive(Debug)]
pub struct Client(Running);

impl Client {
    /// Starts a client.
    pub fn start(order: &Order) -> Result<Self> {
        let expected_ms = match order.window {
            End::Milliseconds(ms) => ms * 2 + 30_000,
            End::Requests(_) => 120_000,
        };
        let text = serde_json::to_string(order).context("cannot encode the client's order")?;
        let client = Shell::new("/proc/self/exe").arg(SUBCOMMAND).input(text);
        let limit = Duration::from_millis(expected_ms + order.hold_ms);
        client.limit(limit).start().map(Client)
    }

    /// Waits for the client to end, and returns what it measured.
    pub fn finish(self) -> Result<Answer> {
        let ended = self.0.finish()?;
        ensure!(ended.status.success(), "{}", last_lines(&ended.stderr, 10));
        serde_json::from_str(&ended.stdout).context("the client gave no answer")
    }
}
