//! Tests of the folders and of what makes them safe.

use std::os::unix::fs::PermissionsExt;

use super::*;

const UID: u32 = 4_000_000_000;

fn resolve(vars: &[(&str, &str)]) -> Result<Bases, ConfigError> {
    let var = |name: &str| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| PathBuf::from(value));
    Bases::resolve(&var, UID, Path::new("/nonexistent"))
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o777
}

#[test]
fn dhow_home_holds_everything() {
    let bases = resolve(&[("DHOW_HOME", "/d"), ("HOME", "/home/u"), ("XDG_RUNTIME_DIR", "/r")]).unwrap();
    assert_eq!(bases.config, Path::new("/d/config"));
    assert_eq!(bases.data, Path::new("/d/data"));
    assert_eq!(bases.cache, Path::new("/d/cache"));
    assert_eq!(bases.run, Path::new("/d/run"));
}

#[test]
fn xdg_variables_then_home_and_relative_ones_are_ignored() {
    let bases = resolve(&[
        ("HOME", "/home/u"),
        ("XDG_CONFIG_HOME", "/c"),
        ("XDG_DATA_HOME", "relative"),
        ("XDG_RUNTIME_DIR", "/r"),
    ])
    .unwrap();
    assert_eq!(bases.config, Path::new("/c/dhow"));
    assert_eq!(bases.data, Path::new("/home/u/.local/share/dhow"));
    assert_eq!(bases.run, Path::new("/r/dhow"));
    let bases = resolve(&[("HOME", "/home/u")]).unwrap();
    assert_eq!(bases.run, PathBuf::from(format!("/tmp/dhow-{UID}")));
    let error = resolve(&[]).unwrap_err();
    assert!(error.to_string().contains("neither XDG_CONFIG_HOME nor HOME"), "{error}");
}

#[test]
fn folders_are_private_and_profiles_are_listed() {
    let home = tempfile::tempdir().unwrap();
    let name: ProfileName = "web".parse().unwrap();
    let paths = Paths::at(home.path(), &name).unwrap();
    paths.create().unwrap();
    paths.create().unwrap();
    for path in [paths.run_dir(), paths.data_dir(), &paths.images_dir(), &paths.log_dir(), &paths.state_dir()]
    {
        assert_eq!(mode(path), 0o700, "{}", path.display());
    }
    std::fs::write(home.path().join("config/profiles/api.toml"), "").unwrap();
    std::fs::write(home.path().join("config/profiles/Not A Name.toml"), "").unwrap();
    let names: Vec<_> = paths.bases.profiles().unwrap();
    assert_eq!(names.iter().map(ProfileName::as_str).collect::<Vec<_>>(), ["api", "web"]);
    assert_eq!(paths.own_dirs().len(), 4);
}

#[test]
fn an_unsafe_run_folder_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let run = home.path().join("run");
    std::fs::create_dir(&run).unwrap();
    std::fs::set_permissions(&run, std::fs::Permissions::from_mode(0o755)).unwrap();
    let error = Paths::at(home.path(), &ProfileName::default()).unwrap_err();
    assert!(error.to_string().contains("mode 755 lets others in"), "{error}");
    std::fs::remove_dir(&run).unwrap();
    std::os::unix::fs::symlink("/tmp", &run).unwrap();
    let error = Paths::at(home.path(), &ProfileName::default()).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
}

#[test]
fn a_long_socket_path_is_refused_with_both_numbers() {
    let home = tempfile::tempdir().unwrap();
    let deep = home.path().join("x".repeat(100));
    let error = Paths::at(&deep, &ProfileName::default()).unwrap().create().unwrap_err();
    assert!(matches!(error, ConfigError::SocketPath { limit: 107, .. }), "{error}");
    assert!(!deep.exists());
}
