//! Tests of the checks on settings.

use super::*;

fn host(home: &Path) -> Host {
    Host { cpus: 4, memory_mib: 8192, home: Some(home.to_owned()) }
}

fn resolve(home: &Path, text: &str) -> Result<Profile, ConfigError> {
    let name = ProfileName::default();
    let paths = Paths::at(&home.join("dhow"), &name)?;
    Profile::resolve(&name, &paths, RawProfile::parse(Path::new("p.toml"), text)?, &host(home))
}

#[test]
fn defaults() {
    let home = tempfile::tempdir().unwrap();
    let profile = resolve(home.path(), "").unwrap();
    assert_eq!((profile.cpus, profile.memory_mib, profile.disk_gib), (2, 2048, 100));
    assert!(profile.activate && profile.image.is_none());
    assert_eq!(profile.acceleration, Acceleration::Auto);
    let path = home.path().canonicalize().unwrap();
    assert_eq!(profile.mounts, [MountSpec { path, read_only: false }]);
    assert_eq!(cpus(None, &Host { cpus: 1, ..host(home.path()) }).unwrap(), 1);
}

#[test]
fn values_out_of_range_are_said_with_both_numbers_and_a_hint() {
    let home = tempfile::tempdir().unwrap();
    let cases = [
        ("cpus = 0", "cpus: 0 CPUs were asked for and this host has 4"),
        ("cpus = 64", "cpus: 64 CPUs were asked for and this host has 4"),
        ("memory = '100MiB'", "memory: 100MiB is below the 512MiB that Docker needs"),
        ("memory = 16", "memory: 16GiB is more than this host's 8192MiB"),
        ("disk = '1500MiB'", "disk: 1500MiB is not a whole number of GiB"),
        ("disk = 0", "disk: 0GiB is not a whole number of GiB"),
        ("disk = '100T'", "disk: 102400GiB is above the limit of 65536GiB"),
        ("image = '/absent'", "image: /absent: No such file or directory (os error 2)"),
        ("image = '/etc/passwd'", "image: /etc/passwd is no folder"),
        ("[env]\n'A B' = 'x'", "env: \"A B\" cannot be a variable's name"),
    ];
    for (text, expected) in cases {
        let error = resolve(home.path(), text).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert!(error.hint().is_some(), "{text}");
    }
}

#[test]
fn a_disk_only_grows() {
    let home = tempfile::tempdir().unwrap();
    let paths = Paths::at(&home.path().join("dhow"), &ProfileName::default()).unwrap();
    paths.create().unwrap();
    std::fs::File::create(paths.disk()).unwrap().set_len(20 << 30).unwrap();
    let error = resolve(home.path(), "disk = 10").unwrap_err();
    assert_eq!(
        error.to_string(),
        "disk: 10GiB is smaller than the disk that is there, 20GiB; a disk only grows"
    );
    assert!(resolve(home.path(), "disk = 20").is_ok());
    assert!(resolve(home.path(), "disk = 21").is_ok());
}

#[test]
fn dhows_own_folders_are_not_shared() {
    let home = tempfile::tempdir().unwrap();
    let paths = Paths::at(&home.path().join("dhow"), &ProfileName::default()).unwrap();
    paths.create().unwrap();
    let error = resolve(home.path(), "mounts = ['~/dhow/data']").unwrap_err();
    assert!(error.to_string().contains("lies in Dhow's own"), "{error}");
}
