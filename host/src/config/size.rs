//! Sizes as a person writes them: `2`, `2GiB`, `512MiB`, `4g`.

use super::ConfigError;

/// `text` in MiB. A bare number is GiB; units are binary, in any case, with or without `iB`.
///
/// # Errors
/// [`ConfigError::Value`] for `setting`.
pub(super) fn mib(setting: &'static str, text: &str) -> Result<u64, ConfigError> {
    let wrong = |problem: String| ConfigError::Value {
        setting,
        problem,
        hint: "write a whole number and a unit, such as 4GiB or 512MiB; a bare number is GiB".to_owned(),
    };
    let trimmed = text.trim();
    let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = trimmed.split_at(digits);
    if number.is_empty() {
        return Err(wrong(format!("{text:?} is not a size")));
    }
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "m" | "mb" | "mib" => 1,
        "" | "g" | "gb" | "gib" => 1 << 10,
        "t" | "tb" | "tib" => 1 << 20,
        _ if unit.starts_with('.') => return Err(wrong(format!("{text:?} is not a whole number"))),
        other => return Err(wrong(format!("{other:?} in {text:?} is not a unit"))),
    };
    let number: Option<u64> = number.parse().ok();
    number
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| wrong(format!("{text:?} is too large")))
}

/// `mib` as a person reads it.
#[must_use]
pub(super) fn display(mib: u64) -> String {
    if mib.is_multiple_of(1 << 10) { format!("{}GiB", mib >> 10) } else { format!("{mib}MiB") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_in_every_spelling() {
        let cases =
            [("2", 2048), ("2GiB", 2048), ("4g", 4096), ("512MiB", 512), (" 512 mb ", 512), ("1T", 1 << 20)];
        for (text, expected) in cases {
            assert_eq!(mib("memory", text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_said_in_words() {
        let cases = [
            ("", "memory: \"\" is not a size"),
            ("two", "memory: \"two\" is not a size"),
            ("-1", "memory: \"-1\" is not a size"),
            ("1.5GiB", "memory: \"1.5GiB\" is not a whole number"),
            ("5 bananas", "memory: \"bananas\" in \"5 bananas\" is not a unit"),
            ("99999999999999999999", "memory: \"99999999999999999999\" is too large"),
            ("99999999999999999T", "memory: \"99999999999999999T\" is too large"),
        ];
        for (text, expected) in cases {
            let error = mib("memory", text).unwrap_err();
            assert_eq!(error.to_string(), expected);
            assert!(error.hint().is_some());
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        assert_eq!(display(2048), "2GiB");
        assert_eq!(display(1536), "1536MiB");
    }
}
