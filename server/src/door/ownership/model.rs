//! Every state that ownership can reach, explored breadth first over the real types. The ublk door, the
//! storage, the clock, the processes and the note are fakes ([`world`]).
//!
//! A state cannot be copied, so each is reached by doing its path again from the beginning. In each, every
//! step that does not have to wait is done, undisturbed and with each [`Interrupt`] before each of its
//! effects. What must hold:
//!
//! - At most one party may write, and the writes of the ublk door are complete when a client may.
//! - A door that may write reads the last write that was acknowledged.
//! - A server has the storage only while its client has the disk, or the disk is kept for that client.
//! - Within the grace only the client that had the disk gets it, or, in a move, its target; and that
//!   client does get it. A client that was succeeded gets it no more.
//! - However it goes on, the disk gets back to the ublk door, and to a client that comes then.

mod run;
mod world;

use std::collections::{HashSet, VecDeque};

use run::{Action, Run, Step};
use world::{Effect, Interrupt};

/// What is explored.
#[derive(Clone, Copy, Debug)]
struct Setup {
    block_door: bool,
    /// `--migration`.
    moves: bool,
    /// Whether guests reset their devices, and effects fail.
    resets: bool,
    /// Servers of the same storage; several have a client each.
    servers: usize,
    /// Clients: 0 and 1 have in-flight memory, 2 has none.
    clients: &'static [usize],
}

/// Explores all states and returns how many there are.
fn explore(setup: Setup) -> Result<usize, String> {
    let mut seen = HashSet::from([Run::new(setup).key()]);
    let mut paths = VecDeque::from([Vec::new()]);
    while let Some(path) = paths.pop_front() {
        let told = |step: &Step, why: String| format!("{why}\nafter {path:#?}\nand {step:?}");
        let ready = Run::replay(setup, &path);
        let actions = ready.enabled();
        drop(ready);
        for action in actions {
            let undisturbed = Step {
                action,
                interrupt: None,
            };
            let mut steps = VecDeque::from([undisturbed]);
            while let Some(step) = steps.pop_front() {
                let mut run = Run::replay(setup, &path);
                let effects = run.step(step).map_err(|why| told(&step, why))?;
                if step.interrupt.is_none() {
                    steps.extend(disturbed(setup, action, &effects));
                }
                if seen.insert(run.key()) {
                    run.wind_down().map_err(|why| told(&step, why))?;
                    let mut further = path.clone();
                    further.push(step);
                    paths.push_back(further);
                }
            }
        }
    }
    Ok(seen.len())
}

/// An action with each interrupt before each of its effects.
fn disturbed(setup: Setup, action: Action, effects: &[Effect]) -> impl Iterator<Item = Step> {
    (0..).zip(effects).flat_map(move |(at, effect)| {
        let meets = move |interrupt: &Interrupt| {
            interrupt.can_meet(*effect) && (setup.resets || *interrupt != Interrupt::Fail)
        };
        let interrupts = Interrupt::ALL.into_iter().filter(meets);
        interrupts.map(move |interrupt| Step {
            action,
            interrupt: Some((at, interrupt)),
        })
    })
}

/// Explores, and fails the test with the path that led to what must not be.
fn holds(setup: Setup, at_least: usize) {
    match explore(setup) {
        Ok(states) => {
            println!("{states} states of {setup:?}");
            assert!(states >= at_least, "only {states} states of {setup:?}");
        }
        Err(why) => panic!("{setup:?}: {why}"),
    }
}

#[test]
fn the_ublk_door_and_clients_never_write_at_once_and_all_get_the_disk() {
    holds(
        Setup {
            block_door: true,
            moves: false,
            resets: true,
            servers: 1,
            clients: &[0, 2],
        },
        100,
    );
}

#[test]
fn clients_that_move_do_not_write_at_once_and_do_not_come_back() {
    holds(
        Setup {
            block_door: true,
            moves: true,
            resets: true,
            servers: 1,
            clients: &[0, 1],
        },
        100,
    );
}

#[test]
fn two_servers_of_one_file_never_write_at_once() {
    holds(
        Setup {
            block_door: false,
            moves: true,
            resets: false,
            servers: 2,
            clients: &[0, 1],
        },
        100,
    );
}
