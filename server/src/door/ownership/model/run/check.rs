//! What must hold: in each state, and in the end.

use std::sync::Arc;

use super::*;

impl Run {
    /// What must hold all the time.
    pub(super) fn check(&self) -> Outcome {
        let facts = self.world.facts();
        let running = |client: &&usize| self.clients[**client].running;
        let numbers: Vec<usize> = (0..CLIENTS).collect();
        let clients: Vec<&usize> = numbers.iter().filter(running).collect();
        ensure(clients.len() + usize::from(facts.gate_open) <= 1, || {
            format!(
                "clients {clients:?} write, and the ublk door: {}",
                facts.gate_open
            )
        })?;
        ensure(!facts.block_write || facts.gate_open, || {
            "the ublk door's writes are not complete".into()
        })?;
        let reader = match clients.first() {
            Some(client) => Some(self.server_of(**client)),
            None => facts.gate_open.then_some(0),
        };
        if let Some(server) = reader {
            let (read, last) = (facts.read(server), facts.acknowledged);
            ensure(read == last, || {
                format!("{read:?} is read, and {last:?} wrote last")
            })?;
        }
        for (number, server) in self.servers.iter().enumerate() {
            let Some(server) = server else { continue };
            let state = &server.inner().state;
            ensure(!matches!(state, State::Opening | State::Draining), || {
                "the disk is on its way, and nobody is at it".into()
            })?;
            let needs_storage = match state {
                State::Upgraded(_) => true,
                State::Waiting(wait) => !wait.holder.moving,
                _ => false,
            };
            ensure(needs_storage || facts.claimed != Some(number), || {
                format!("server {number} has the storage, and nobody needs it there")
            })?;
        }
        Ok(())
    }

    /// All clients end, and time goes by: then the disk is the ublk door's, and a client's that comes.
    pub(in super::super) fn wind_down(mut self) -> Outcome {
        for &client in self.setup.clients {
            self.act(Step {
                action: Action::Kill(client),
                interrupt: None,
            })?;
        }
        for server in 0..self.setup.servers {
            if self.servers[server].is_none() {
                self.start(server)?;
            }
            while self.world.has_timer(server) {
                self.world.grace_over(server);
            }
            self.expected[server].gone();
        }
        let gate_open = self.world.facts().gate_open;
        ensure(gate_open == self.setup.block_door, || {
            "the ublk door does not get the disk back".into()
        })?;
        for server in 0..self.setup.servers {
            let Some(ownership) = self.servers[server].clone() else {
                continue;
            };
            let got = ownership.take(self.client(LATE));
            let lease = got.map_err(|refused: Refused| format!("for ever: {refused}"))?;
            lease.leave();
        }
        Ok(())
    }

    /// What tells this state from others.
    pub(in super::super) fn key(&self) -> String {
        let facts = self.world.facts();
        let world = (
            &facts.notes,
            (facts.gate_open, facts.block_write, facts.claimed),
            // Who wrote is of no importance.
            facts.disk == facts.acknowledged,
            (facts.cached).map(|cached| cached.map(|writer| writer == facts.acknowledged)),
        );
        let server = |server: &Arc<Ownership>| {
            let inner = server.inner();
            match &inner.state {
                State::Waiting(wait) => format!("waits for {:?}", wait.holder),
                State::Upgraded(client) => format!("has {:?}", client.identity),
                State::Moving(client) => format!("moves {:?}", client.identity),
                state => format!("{:?}", std::mem::discriminant(state)),
            }
        };
        let servers = self.servers.each_ref().map(|one| one.as_ref().map(server));
        let client = |(number, client): (usize, &ClientState)| {
            (
                client.lease.as_ref().map(|(server, _)| *server),
                self.is_owner(number),
                (client.running, client.in_flight),
                (client.has_new_memory, client.ended),
            )
        };
        let clients: Vec<_> = self.clients.iter().enumerate().map(client).collect();
        let key = format!("{world:?}{servers:?}{clients:?}{:?}", self.expected);
        drop(facts);
        let timers: Vec<_> = (0..SERVERS)
            .map(|server| self.world.has_timer(server))
            .collect();
        format!("{key}{timers:?}")
    }
}
