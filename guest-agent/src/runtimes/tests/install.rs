//! Offers: taken, resumed, refused.

use super::*;
use crate::runtimes::store::Role;

const DAEMON: &str = "[[daemon]]\nname = \"x\"\nargv = [\"/bin/x\"]\n";

fn roles(guest: &Guest) -> (Option<Digest>, Option<Digest>) {
    (guest.store.digest("test", Role::Installed), guest.store.digest("test", Role::Good))
}

fn files(guest: &Guest) -> Vec<String> {
    let entries = std::fs::read_dir(&guest.store.bundles).unwrap();
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    files
}

#[tokio::test]
async fn an_image_is_received_verified_and_mounted_once() {
    let guest = Guest::new().await;
    let image = image("1", DAEMON);
    assert_eq!(guest.install(&image).await, (BundleAnswer::Send { offset: 0 }, Ok(())));
    let digest = digest_of(&image);
    assert_eq!(std::fs::read(guest.store.image(digest)).unwrap(), image);
    assert_eq!(roles(&guest), (Some(digest), None));
    assert!(guest.mount.is_mounted(&guest.store.mount_folder("test", digest)).unwrap());
    assert_eq!(guest.install(&image).await, (BundleAnswer::Have, Ok(())));
    assert_eq!(files(&guest), [format!("{digest}.erofs"), "test.installed".to_owned()]);
}

#[tokio::test]
async fn a_transfer_that_broke_off_is_gone_on_with() {
    let guest = Guest::new().await;
    let image = image("1", DAEMON);
    let cut = image.len() / 2 + 7;
    let first = image[..cut].to_vec();
    let (mut host, theirs) = tokio::io::duplex(64 << 10);
    let (runtimes, offer) = (Arc::clone(&guest.runtimes), offer_of(&image));
    let serving = tokio::spawn(async move { runtimes.receive(offer, theirs).await });
    let answer = codec::read_frame::<BundleAnswer, _>(&mut host, CONTROL_LIMIT).await.unwrap();
    assert_eq!(answer, Some(BundleAnswer::Send { offset: 0 }));
    host.write_all(&first).await.unwrap();
    drop(host);
    serving.await.unwrap();
    assert_eq!(roles(&guest), (None, None));
    assert_eq!(guest.install(&image).await, (BundleAnswer::Send { offset: cut as u64 }, Ok(())));
    assert_eq!(std::fs::read(guest.store.image(digest_of(&image))).unwrap(), image);
}

#[tokio::test]
async fn other_bytes_than_offered_are_discarded() {
    let guest = Guest::new().await;
    let image = image("1", DAEMON);
    let mut other = image.clone();
    other[1000] ^= 1;
    let (_, result) = guest
        .offer(offer_of(&image), |mut stream, _| {
            tokio::spawn(async move {
                stream.write_all(&other).await.unwrap();
                stream
            })
        })
        .await;
    let reason = result.unwrap_err();
    assert!(reason.contains(&digest_of(&image).to_string()), "{reason}");
    assert_eq!(files(&guest), [""; 0]);
    // A part with wrong bytes costs one more transfer, not more.
    std::fs::write(guest.store.part(digest_of(&image)), "wrong").unwrap();
    let (answer, result) = guest.install(&image).await;
    assert_eq!(answer, BundleAnswer::Send { offset: 5 });
    assert!(result.unwrap_err().contains("discarded"));
    assert_eq!(guest.install(&image).await, (BundleAnswer::Send { offset: 0 }, Ok(())));
    // And one that is longer than the whole is not gone on with.
    let second = self::image("2", DAEMON);
    std::fs::write(guest.store.part(digest_of(&second)), vec![0; second.len() + 1]).unwrap();
    assert_eq!(guest.install(&second).await, (BundleAnswer::Send { offset: 0 }, Ok(())));
}

#[tokio::test]
async fn an_offer_out_of_bounds_is_refused_before_a_byte_is_sent() {
    let guest = Guest::new().await;
    let good = offer_of(&image("1", DAEMON));
    let mut offers = Vec::new();
    for name in ["", "../x", "a/b", "A", "x\0", &"x".repeat(33)] {
        offers.push((BundleOffer { name: name.to_owned(), ..good.clone() }, "name"));
    }
    offers.push((BundleOffer { version: "1\u{1b}[2J".to_owned(), ..good.clone() }, "version"));
    offers.push((BundleOffer { size: 0, ..good.clone() }, "size"));
    for size in [u64::MAX, 1 << 60] {
        offers.push((BundleOffer { size, ..good.clone() }, "left"));
    }
    for (offer, named) in offers {
        let size = offer.size;
        let (answer, result) = guest
            .offer(offer, |stream, offset| {
                assert_eq!(offset, size);
                tokio::spawn(std::future::ready(stream))
            })
            .await;
        assert_eq!(answer, BundleAnswer::Send { offset: size });
        let reason = result.unwrap_err();
        assert!(reason.contains(named), "{reason}");
    }
    assert_eq!(files(&guest), [""; 0]);
}

#[tokio::test]
async fn an_image_that_is_of_no_use_goes() {
    let guest = Guest::new().await;
    let named = |from: &str, to: &str| {
        let text = String::from_utf8(image("1", DAEMON)[..100].to_vec()).unwrap();
        assert!(text.contains(from));
        let end = text.find('\0').unwrap();
        let mut image = text[..end].replace(from, to).into_bytes();
        image.push(0);
        image
    };
    for (image, reason) in [
        (vec![0; 5000], "cannot be mounted"),
        (named("\"test\"", "\"other\""), "calls itself other"),
        (named("trixie", "sid"), "base release sid, and the guest's is trixie"),
        (named("version", "vision"), "expects"),
    ] {
        let (_, result) = guest.install(&image).await;
        let told = result.unwrap_err();
        assert!(told.contains(reason), "{told}");
        assert_eq!(files(&guest), [""; 0]);
        assert!(guest.store.mount_folders("test").is_empty());
    }
    // One that has become so on the disk is asked for again.
    let image = image("1", DAEMON);
    guest.installed(&image).await;
    let digest = digest_of(&image);
    guest.mount.detach(&guest.store.mount_folder("test", digest)).unwrap();
    std::fs::write(guest.store.image(digest), vec![0; 100]).unwrap();
    assert_eq!(guest.install(&image).await, (BundleAnswer::Send { offset: 0 }, Ok(())));
}

#[tokio::test]
async fn only_the_image_before_stays() {
    let guest = Guest::new().await;
    let images = ["1", "2", "3"].map(|version| image(version, DAEMON));
    let [one, two, three] = [0, 1, 2].map(|at| digest_of(&images[at]));
    guest.installed(&images[0]).await;
    guest.store.set("test", Role::Good, one).unwrap();
    guest.installed(&images[1]).await;
    assert_eq!(roles(&guest), (Some(two), Some(one)));
    assert!(guest.store.image(one).exists());
    guest.store.set("test", Role::Good, two).unwrap();
    guest.installed(&images[2]).await;
    assert_eq!(roles(&guest), (Some(three), Some(two)));
    assert!(!guest.store.image(one).exists());
    assert!(guest.store.image(two).exists());
}

/// A filesystem of 24 MiB that nobody else sees and that goes with its fd.
fn small_disk() -> Option<std::os::fd::OwnedFd> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };
    let disk = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).and_then(|context| {
        fsconfig_set_string(&context, "size", "24m")?;
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    });
    disk.map_err(|error| eprintln!("skipped: no filesystem can be made here: {error}")).ok()
}

#[tokio::test]
async fn a_full_disk_is_a_sentence_and_leaves_nothing() {
    use std::os::fd::AsRawFd;
    let Some(disk) = small_disk() else { return };
    let disk = PathBuf::from(format!("/proc/self/fd/{}", disk.as_raw_fd()));
    let root = tempfile::tempdir().unwrap();
    let store = Store {
        bundles: disk.join("bundles"),
        logs: root.path().join("log"),
        view: root.path().join("view"),
        run: root.path().join("run"),
    };
    let guest = Guest::with(root, store).await;
    let mut image = image("1", DAEMON);
    image.resize(12 << 20, 7);
    // Somebody else fills the disk after the offer was taken.
    let filler = disk.join("filler");
    let sent = image.clone();
    let (answer, result) = guest
        .offer(offer_of(&image), |mut stream, offset| {
            assert_eq!(offset, 0);
            std::fs::write(&filler, vec![1; 16 << 20]).unwrap();
            tokio::spawn(async move {
                stream.write_all(&sent).await.unwrap();
                stream
            })
        })
        .await;
    assert_eq!(answer, BundleAnswer::Send { offset: 0 });
    let reason = result.unwrap_err();
    assert!(reason.contains("disk is full") && reason.contains("12 MiB"), "{reason}");
    assert_eq!(files(&guest), [""; 0]);
    // Now it is known beforehand.
    let (answer, result) = guest.install(&image).await;
    assert_eq!(answer, BundleAnswer::Send { offset: image.len() as u64 });
    let reason = result.unwrap_err();
    assert!(reason.contains("needs 12 MiB"), "{reason}");
    std::fs::remove_file(disk.join("filler")).unwrap();
    assert_eq!(guest.install(&image).await.1, Ok(()));
}
