//! The layout of `user_data`, in one place.
//!
//! | bits  | what                                         |
//! |-------|----------------------------------------------|
//! | 0–31  | index: a slot, a tag, a queue                 |
//! | 32–47 | kind: the owner's own meaning                 |
//! | 48–55 | owner                                         |
//! | 56–63 | zero                                          |

/// Who gets a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// The result is not needed (a cancellation's own completion).
    None = 0,
    /// The mailbox of the thread.
    Mailbox = 1,
    /// The door.
    Door = 2,
    /// The storage.
    Storage = 3,
    /// The storage's bell: requests have ended elsewhere.
    Bell = 4,
}

impl Owner {
    /// How many there are.
    pub(super) const COUNT: usize = 5;
}

/// Who gets a completion and what it is about; travels through the kernel as `user_data`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// Who gets the completion.
    pub owner: Owner,
    /// Which operation; its meaning is the owner's.
    pub kind: u16,
    /// Of which slot, tag or queue.
    pub index: u32,
}

impl Token {
    /// The token as `user_data`.
    #[must_use]
    pub const fn encode(self) -> u64 {
        (self.owner as u64) << 48 | (self.kind as u64) << 32 | self.index as u64
    }

    /// The token from a completion's `user_data`.
    ///
    /// # Panics
    ///
    /// When the kernel hands back what [`Token::encode`] never made.
    #[must_use]
    pub const fn decode(user_data: u64) -> Self {
        let owner = match user_data >> 48 {
            0 => Owner::None,
            1 => Owner::Mailbox,
            2 => Owner::Door,
            3 => Owner::Storage,
            4 => Owner::Bell,
            _ => panic!("user_data that is not a token"),
        };
        #[expect(clippy::cast_possible_truncation, reason = "fields of a packed word")]
        Self {
            owner,
            kind: (user_data >> 32) as u16,
            index: user_data as u32,
        }
    }
}

const _: () = {
    let last = Token {
        owner: Owner::Bell,
        kind: u16::MAX,
        index: u32::MAX,
    };
    assert!(last.encode() >> 56 == 0);
    let back = Token::decode(last.encode());
    assert!(back.kind == u16::MAX && back.index == u32::MAX);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_way_through_user_data() {
        for owner in [
            Owner::None,
            Owner::Mailbox,
            Owner::Door,
            Owner::Storage,
            Owner::Bell,
        ] {
            for kind in [0, 1, 0x8000, u16::MAX] {
                for index in [0, 1, 0x8000_0000, u32::MAX] {
                    let token = Token { owner, kind, index };
                    assert_eq!(Token::decode(token.encode()), token);
                }
            }
        }
    }
}
