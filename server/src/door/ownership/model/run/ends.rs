//! How servers end: in order, or in the middle of an action.

use super::*;

impl Run {
    /// A server ends in order and leaves everything to the next one.
    pub(super) fn leave(&mut self, server: usize) {
        if let Some(ownership) = &self.servers[server] {
            ownership.close();
        }
        let mut facts = self.world.facts();
        if self.setup.block_door && std::mem::take(&mut facts.block_write) {
            facts.write(Writer::Block, server, false);
        }
        drop(facts);
        for client in 0..CLIENTS {
            if (self.clients[client].lease.as_ref()).is_some_and(|(of, _)| *of == server) {
                self.finish_request(client);
                self.clients[client].running = false;
                self.clients[client].lease = None;
            }
        }
        self.world.end_life(server);
        self.ended(server);
    }

    /// A server is gone.
    pub(super) fn ended(&mut self, server: usize) {
        for client in &mut self.clients {
            if let Some((_, lease)) = client.lease.as_mut().filter(|(of, _)| *of == server) {
                // A process that dies ends nothing in order.
                lease.ownership = None;
                client.running = false;
                client.lease = None;
            }
        }
        self.servers[server] = None;
        let noted = self.world.facts().notes[server].clone();
        let expected = &mut self.expected[server];
        // It may have ended, or failed, before it noted a stop for a migration.
        expected.moving &= noted.holder.is_some_and(|holder| holder.moving);
        expected.for_target = expected.moving;
    }

    /// A server died in the middle of an action. What the action was to change has changed or has not; the note
    /// tells.
    pub(super) fn crashed(&mut self, action: Action) {
        let dead = |server: &usize| self.world.facts().lives[*server].is_none();
        let Some(server) =
            (0..SERVERS).find(|server| dead(server) && self.servers[*server].is_some())
        else {
            unreachable!("a server has died");
        };
        let noted = self.world.facts().notes[server].holder.clone();
        let is = |client: usize| {
            (noted.as_ref()).is_some_and(|holder| holder.identity.process == Some(process(client)))
        };
        let is_moving = noted.as_ref().is_some_and(|holder| holder.moving);
        match action {
            Action::Take(client, _) | Action::Resume(client)
                if is(client) && self.may_have(client, server).is_ok() && !is_moving =>
            {
                self.has(client, server);
                // It has not presented its memory before this is noted.
                let memory = noted.and_then(|holder| holder.identity.memory);
                self.expected[server].at_rest = has_memory(client) && memory.is_none();
            }
            Action::HangUp(_) | Action::Kill(_) | Action::GraceOver(_) if noted.is_none() => {
                self.expected[server].gone();
            }
            _ => {}
        }
        self.ended(server);
    }
}
