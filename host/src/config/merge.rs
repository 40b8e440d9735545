//! Flags of `dhow start` merged into the profile file: comments stay, and the file is never half written.

use std::io::Write;
use std::path::{Path, PathBuf};

use toml_edit::{Array, DocumentMut, value};

use super::file::{RawProfile, TEMPLATE, read_text};
use super::profile::{Acceleration, Host, Profile};
use super::{ConfigError, Paths, mounts};

/// Settings as typed on the command line; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Virtual CPUs.
    pub cpus: Option<i64>,
    /// Memory, as in the file.
    pub memory: Option<String>,
    /// Size of the data disk, as in the file.
    pub disk: Option<String>,
    /// All shares, as in the file; an empty list shares nothing.
    pub mounts: Option<Vec<String>>,
    /// Folder of the system image.
    pub image: Option<PathBuf>,
    /// Make the docker context current.
    pub activate: Option<bool>,
    /// How the guest's code is run.
    pub acceleration: Option<Acceleration>,
}

/// Merges `overrides` into the profile's file, which is made where there is none, and returns the
/// settings that hold now. Nothing is written unless all of them are valid.
///
/// # Errors
/// As [`ConfigError`] says.
pub fn save(paths: &Paths, overrides: &Overrides) -> Result<Profile, ConfigError> {
    save_on(paths, overrides, &Host::current())
}

fn save_on(paths: &Paths, overrides: &Overrides, host: &Host) -> Result<Profile, ConfigError> {
    let file = paths.profile_file();
    let before = read_text(&file)?;
    let text = before.as_deref().unwrap_or(TEMPLATE);
    // Mistakes in the file itself are told with their lines.
    RawProfile::parse(&file, text)?;
    let merged = merge(&file, text, overrides, paths, host)?;
    let profile = Profile::resolve(paths.profile(), paths, RawProfile::parse(&file, &merged)?, host)?;
    if before.as_deref() != Some(&merged) {
        replace(&file, merged.as_bytes())?;
    }
    Ok(profile)
}

/// The text of the file with `overrides` in it.
fn merge(
    file: &Path,
    text: &str,
    overrides: &Overrides,
    paths: &Paths,
    host: &Host,
) -> Result<String, ConfigError> {
    let mut document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| {
        ConfigError::Syntax { path: file.to_owned(), line: 1, problem: error.message().to_owned() }
    })?;
    let mut settings: Vec<(&str, toml_edit::Item)> = Vec::new();
    settings.extend(overrides.cpus.map(|cpus| ("cpus", value(cpus))));
    settings.extend(overrides.memory.as_ref().map(|size| ("memory", value(size))));
    settings.extend(overrides.disk.as_ref().map(|size| ("disk", value(size))));
    if let Some(given) = &overrides.mounts {
        // Relative paths are of this folder, and the file is read from others.
        let own = paths.own_dirs();
        let specs = given.iter().map(|text| mounts::resolve(text, host.home.as_deref(), &own));
        let specs: Vec<String> =
            specs.map(|spec| spec.map(|spec| spec.to_string())).collect::<Result<_, _>>()?;
        settings.push(("mounts", value(specs.into_iter().collect::<Array>())));
    }
    if let Some(image) = &overrides.image {
        let image = std::path::absolute(image).unwrap_or_else(|_| image.clone());
        settings.push(("image", value(image.to_string_lossy().into_owned())));
    }
    settings.extend(overrides.activate.map(|activate| ("activate", value(activate))));
    settings.extend(overrides.acceleration.map(|kind| ("acceleration", value(kind.as_str()))));

    let mut text = document.to_string();
    for (key, item) in settings {
        if document.contains_key(key) {
            document[key] = with_decor_of(&document[key], item);
            text = document.to_string();
        } else {
            text = insert(&text, key, &item);
            document = text.parse().map_err(|error: toml_edit::TomlError| ConfigError::Syntax {
                path: file.to_owned(),
                line: 1,
                problem: error.message().to_owned(),
            })?;
        }
    }
    Ok(text)
}

/// `new` with the blanks and the comment around `old`.
fn with_decor_of(old: &toml_edit::Item, mut new: toml_edit::Item) -> toml_edit::Item {
    if let (Some(old), Some(new)) = (old.as_value(), new.as_value_mut()) {
        *new.decor_mut() = old.decor().clone();
    }
    new
}

/// Puts a new key where the template shows its default, else before the first table.
fn insert(text: &str, key: &str, item: &toml_edit::Item) -> String {
    let line = format!("{key} = {}", item.to_string().trim());
    let lines: Vec<&str> = text.lines().collect();
    let shown = format!("# {key} = ");
    let table = lines.iter().position(|line| line.trim_start().starts_with('['));
    let place = lines.iter().position(|line| line.starts_with(&shown));
    // The commented-out [env] is no table: only what follows a real one is out of place.
    let (at, replaces) = match place {
        Some(at) if table.is_none_or(|table| at < table) => (at, 1),
        _ => (table.unwrap_or(lines.len()), 0),
    };
    let mut merged: Vec<&str> = lines[..at].to_vec();
    merged.push(&line);
    merged.extend(&lines[at + replaces..]);
    merged.join("\n") + "\n"
}

/// Writes a file as a whole or not at all.
pub(super) fn replace(file: &Path, content: &[u8]) -> Result<(), ConfigError> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let fail = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| ConfigError::Io { action, path, source }
    };
    // A name of this process: two commands at a time must not write into one file.
    let temporary = file.with_extension(format!("toml.{}.new", std::process::id()));
    let write = || {
        let mut new = std::fs::File::create(&temporary)?;
        new.write_all(content)?;
        new.sync_all()
    };
    if let Err(error) = write() {
        let _ = std::fs::remove_file(&temporary);
        return Err(fail("write", &temporary)(error));
    }
    std::fs::rename(&temporary, file).map_err(fail("replace", file))?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail("write back", folder))
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
