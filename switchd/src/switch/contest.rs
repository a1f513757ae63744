//! A caller whose certificate another connected switch has: has that one started anew, or are there two?
//!
//! The connection that stands tells: as soon as the peer at its end is heard on it, the caller is the second one and refused;
//! when it breaks, as that of a dead switch does within 1.5 s, the caller takes its place.

use super::{Command, Switch};
use crate::members::LinkId;
use violin_common::Instant;
use violin_common::control::mesh::{Hello, Message};

/// Messages that may wait for the end of a contest: more than a peer says before it has been answered.
const HELD: usize = 256;

#[derive(Debug)]
pub(super) struct Contest {
    standing: LinkId,
    hello: Hello,
    held: Vec<Message>,
}

impl Contest {
    pub(super) fn hold(&mut self, message: Message) -> Result<(), String> {
        if self.held.len() >= HELD {
            return Err(format!("got {HELD} messages while another switch with that certificate is looked for; call again"));
        }
        self.held.push(message);
        Ok(())
    }
}

impl Switch {
    pub(super) fn contest(&mut self, id: LinkId, standing: LinkId, hello: Hello) {
        self.contests.insert(id, Contest { standing, hello, held: Vec::new() });
        self.commands.push(Command::Watch { link: standing });
    }

    /// The peer at the end of this connection answers.
    pub fn handle_answers(&mut self, now: Instant, link: LinkId) {
        let lost = self.contests.extract_if(.., |_, contest| contest.standing == link).collect::<Vec<_>>();
        for (id, contest) in lost {
            let why = self.members.refuse_rival(now, id, contest.hello.boot);
            self.commands.push(Command::Close { link: id, why, refused: true });
        }
    }

    /// A connection is gone: who wanted the place of the peer at its end gets it, the newest first.
    pub(super) fn contest_won(&mut self, now: Instant, link: LinkId) {
        let won = self.contests.extract_if(.., |_, contest| contest.standing == link).collect::<Vec<_>>();
        for (id, contest) in won.into_iter().rev() {
            let said = std::iter::once(Message::Hello(contest.hello)).chain(contest.held);
            for message in said {
                if self.handle_message(now, id, message).is_err() {
                    break;
                }
            }
        }
    }
}
