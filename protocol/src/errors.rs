//! An error and its causes as one text: what a log has, and what one side tells the other.

use std::error::Error;

/// `error` and its sources, joined by colons. Displays never repeat their source, so nothing is said
/// twice.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn causes_follow_in_order() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot open the disk")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::from_raw_os_error(2));
        assert_eq!(super::chain(&error), "cannot open the disk: No such file or directory (os error 2)");
    }
}
