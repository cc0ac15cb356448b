//! Users and groups of this machine, by name or number.

use std::fmt;
use std::str::FromStr;

use nix::unistd;

macro_rules! account {
    ($name:ident, $what:literal, $of_system:ty, $id:ident) => {
        #[doc = concat!("A ", $what, " of this machine.")]
        #[derive(Clone, Debug)]
        pub struct $name {
            /// As it was given.
            text: String,
            /// Its number.
            pub id: u32,
        }

        impl $name {
            #[doc = concat!("The same ", $what, ", given by its number.")]
            #[must_use]
            pub fn by_number(&self) -> Self {
                Self {
                    text: self.id.to_string(),
                    id: self.id,
                }
            }
        }

        // Whether it was given by name or by number.
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.id == other.id
            }
        }

        impl Eq for $name {}

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let id = match text.parse() {
                    // The last one stands for "leave it as it is" (chown(2)).
                    Ok(id) if id < u32::MAX => id,
                    _ => match <$of_system>::from_name(text) {
                        Ok(Some(found)) => found.$id.as_raw(),
                        Ok(None) => {
                            return Err(format!(
                                concat!("this machine has no ", $what, " called '{}'"),
                                text
                            ));
                        }
                        Err(error) => {
                            return Err(format!(
                                concat!("cannot look up the ", $what, ": {}"),
                                error
                            ));
                        }
                    },
                };
                Ok(Self {
                    text: text.to_owned(),
                    id,
                })
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.text)
            }
        }

        serialize_as_text!($name);
    };
}

account!(User, "user", unistd::User, uid);
account!(Group, "group", unistd::Group, gid);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name_and_by_number() {
        assert_eq!("root".parse::<User>().map(|user| user.id), Ok(0));
        assert_eq!("root".parse::<Group>().map(|group| group.id), Ok(0));
        assert_eq!("65534".parse::<Group>().map(|group| group.id), Ok(65534));
        for wrong in ["nobody-here-has-this-name", "4294967295", "-1", ""] {
            let refused = wrong.parse::<User>().unwrap_err();
            assert_eq!(
                refused,
                format!("this machine has no user called '{wrong}'")
            );
        }
    }
}
