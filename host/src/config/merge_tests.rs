//! Tests of merging flags into a profile file.

use super::*;
use crate::config::ProfileName;

struct Fixture {
    home: tempfile::TempDir,
    paths: Paths,
}

impl Fixture {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let paths = Paths::at(&home.path().join("dhow"), &ProfileName::default()).unwrap();
        paths.create().unwrap();
        Self { home, paths }
    }

    fn save(&self, overrides: &Overrides) -> Result<Profile, ConfigError> {
        let host = Host { cpus: 4, memory_mib: 8192, home: Some(self.home.path().to_owned()) };
        save_on(&self.paths, overrides, &host)
    }

    fn text(&self) -> String {
        std::fs::read_to_string(self.paths.profile_file()).unwrap()
    }
}

fn sized(memory: &str) -> Overrides {
    Overrides { memory: Some(memory.to_owned()), ..Overrides::default() }
}

#[test]
fn a_new_profile_gets_the_commented_file() {
    let fixture = Fixture::new();
    fixture.save(&Overrides::default()).unwrap();
    assert_eq!(fixture.text(), TEMPLATE);
}

#[test]
fn flags_take_the_place_of_the_shown_defaults() {
    let fixture = Fixture::new();
    let folder = fixture.home.path().join("work");
    std::fs::create_dir(&folder).unwrap();
    let profile = fixture
        .save(&Overrides {
            cpus: Some(3),
            disk: Some("20GiB".to_owned()),
            mounts: Some(vec!["~/work:ro".to_owned()]),
            activate: Some(false),
            acceleration: Some(Acceleration::Tcg),
            ..sized("4g")
        })
        .unwrap();
    assert_eq!((profile.cpus, profile.memory_mib, profile.disk_gib), (3, 4096, 20));
    let folder = folder.canonicalize().unwrap();
    let expected = TEMPLATE
        .replace("# cpus = 2\n", "cpus = 3\n")
        .replace("# memory = \"2GiB\"", "memory = \"4g\"")
        .replace("# disk = \"100GiB\"", "disk = \"20GiB\"")
        .replace("# mounts = [\"~\"]", &format!("mounts = [\"{}:ro\"]", folder.display()))
        .replace("# activate = true", "activate = false")
        .replace("# acceleration = \"auto\"", "acceleration = \"tcg\"");
    assert_eq!(fixture.text(), expected);
    // Settings stay until they are changed.
    assert_eq!(fixture.save(&Overrides::default()).unwrap(), profile);
    assert_eq!(fixture.text(), expected);
}

#[test]
fn comments_and_order_of_a_file_stay() {
    let fixture = Fixture::new();
    let mine = "# mine\nmemory = '1GiB' # enough\n\n# last\n[env]\nTZ = 'UTC' # here\n";
    std::fs::write(fixture.paths.profile_file(), mine).unwrap();
    let overrides = Overrides { cpus: Some(1), ..sized("3GiB") };
    fixture.save(&overrides).unwrap();
    assert_eq!(
        fixture.text(),
        "# mine\nmemory = \"3GiB\" # enough\n\n# last\ncpus = 1\n[env]\nTZ = 'UTC' # here\n"
    );
}

#[test]
fn what_is_not_valid_changes_nothing() {
    let fixture = Fixture::new();
    fixture.save(&sized("1GiB")).unwrap();
    let before = fixture.text();
    for bad in [sized("9 lives"), sized("64GiB"), Overrides { cpus: Some(99), ..sized("2GiB") }] {
        fixture.save(&bad).unwrap_err();
        assert_eq!(fixture.text(), before);
    }
    std::fs::write(fixture.paths.profile_file(), "memroy = 2").unwrap();
    assert!(fixture.save(&sized("2GiB")).unwrap_err().to_string().contains("unknown key `memroy`"));
    let left: Vec<_> = std::fs::read_dir(fixture.paths.profile_file().parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "a temporary file is left");
}
