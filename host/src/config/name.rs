//! The name of a profile: a word that is safe in paths, sockets and hostnames.

use std::fmt;
use std::str::FromStr;

use super::ConfigError;

/// Longest name, in bytes.
const MAX: usize = 31;

/// A profile's name: `[a-z0-9][a-z0-9-]{0,30}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProfileName(String);

impl ProfileName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is the profile that is meant where none is named.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.0 == "default"
    }
}

impl Default for ProfileName {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ProfileName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || text.len() > MAX || text.starts_with('-') || !text.bytes().all(good) {
            return Err(ConfigError::ProfileName(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_words() {
        for good in ["default", "a", "9", "web-2", &"x".repeat(31)] {
            assert_eq!(good.parse::<ProfileName>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", "A", "a/b", "..", "a_b", "a b", "é", &"x".repeat(32)] {
            assert!(bad.parse::<ProfileName>().is_err(), "{bad:?}");
        }
    }
}
