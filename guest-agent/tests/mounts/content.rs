//! Bytes: sizes and offsets, maps of memory, several processes at once.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MsFlags, ProtFlags, mmap, msync, munmap};
use sha2::{Digest, Sha256};

use crate::harness::World;

/// Bytes that differ from place to place.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn hash(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

#[test]
fn files_of_all_sizes_are_whole_both_ways() {
    let world = World::new();
    let sizes =
        [0, 1, 4095, 4096, 4097, 131_071, 131_072, 131_073, 1 << 20, (1 << 20) + 1, 3_333_333, 5 << 20];
    for (seed, size) in sizes.into_iter().enumerate() {
        let data = bytes(seed as u64, size);
        fs::write(world.in_guest("up"), &data).unwrap();
        assert_eq!(hash(&fs::read(world.on_host("up")).unwrap()), hash(&data), "{size} to the host");
        fs::remove_file(world.in_guest("up")).unwrap();
        let name = format!("down-{size}");
        fs::write(world.on_host(&name), &data).unwrap();
        assert_eq!(hash(&fs::read(world.in_guest(&name)).unwrap()), hash(&data), "{size} from the host");
    }
}

#[test]
fn odd_offsets_hit_what_they_mean() {
    let world = World::new();
    let mut data = bytes(1, 2_000_003);
    fs::write(world.in_guest("file"), &data).unwrap();
    let file = File::options().read(true).write(true).open(world.in_guest("file")).unwrap();
    for (at, length) in [(0, 1), (1, 4096), (4095, 2), (999_999, 123_457), (1_048_575, 3), (1_999_999, 4)] {
        let piece = bytes(at as u64, length);
        file.write_all_at(&piece, at as u64).unwrap();
        data[at..at + length].copy_from_slice(&piece);
        let mut back = vec![0; length];
        file.read_exact_at(&mut back, at as u64).unwrap();
        assert_eq!(back, piece, "{length} bytes at {at}");
    }
    assert_eq!(hash(&fs::read(world.on_host("file")).unwrap()), hash(&data));
    // A hole reads as zeros, and a read behind the end gives nothing.
    file.write_all_at(b"end", 5_000_000).unwrap();
    let mut hole = vec![1; 100];
    file.read_exact_at(&mut hole, 3_000_000).unwrap();
    assert_eq!(hole, vec![0; 100]);
    assert_eq!(file.read_at(&mut hole, 5_000_003).unwrap(), 0);
    assert_eq!(file.read_at(&mut hole, 5_000_001).unwrap(), 2);
    file.set_len(2_500_000).unwrap();
    assert_eq!(file.read_at(&mut hole, 2_499_999).unwrap(), 1);
    assert_eq!(fs::metadata(world.on_host("file")).unwrap().len(), 2_500_000);
}

/// A mapping of a whole file.
struct Map(NonNull<u8>, usize);

impl Map {
    fn new(file: &File, length: usize, protection: ProtFlags) -> Self {
        let size = NonZeroUsize::new(length).unwrap();
        // SAFETY: a new mapping at a place that the kernel chooses; it is used through this type alone.
        let at = unsafe { mmap(None, size, protection, MapFlags::MAP_SHARED, file, 0) }.unwrap();
        Self(at.cast(), length)
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable, that long, until it is dropped; the tests shorten no mapped file.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.1) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and mapped writable by those who call this.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), self.1) }
    }

    fn sync(&self) {
        // SAFETY: the mapping is there.
        unsafe { msync(self.0.cast(), self.1, MsFlags::MS_SYNC) }.unwrap();
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping is there, and nothing borrows from it any more.
        unsafe { munmap(self.0.cast(), self.1) }.unwrap();
    }
}

#[test]
fn files_can_be_mapped() {
    let world = World::new();
    let mut data = bytes(3, 1_500_001);
    fs::write(world.on_host("file"), &data).unwrap();
    let file = File::options().read(true).write(true).open(world.in_guest("file")).unwrap();
    let map = Map::new(&file, data.len(), ProtFlags::PROT_READ);
    assert_eq!(hash(map.bytes()), hash(&data));
    drop(map);
    let mut map = Map::new(&file, data.len(), ProtFlags::PROT_READ | ProtFlags::PROT_WRITE);
    for at in [0, 4095, 4096, 777_777, 1_500_000] {
        map.bytes_mut()[at] = 0xee;
        data[at] = 0xee;
    }
    // Another process of the guest sees it at once, the host once it is written back.
    assert_eq!(hash(&fs::read(world.in_guest("file")).unwrap()), hash(&data));
    map.sync();
    assert_eq!(hash(&fs::read(world.on_host("file")).unwrap()), hash(&data));
    map.bytes_mut()[9] = 0xdd;
    data[9] = 0xdd;
    drop(map);
    file.sync_all().unwrap();
    assert_eq!(hash(&fs::read(world.on_host("file")).unwrap()), hash(&data));
    // Programs run from a share.
    fs::copy("/bin/true", world.on_host("program")).unwrap();
    assert!(world.run("./program").status().unwrap().success());
}

#[test]
fn two_processes_append_without_loss() {
    let world = World::new();
    let line = |name: &str| format!("for n in $(seq 400); do echo {name}-$n >> log; done");
    let mut writers: Vec<_> =
        ["one", "two"].iter().map(|name| world.run(&line(name)).spawn().unwrap()).collect();
    writers.iter_mut().for_each(|writer| assert!(writer.wait().unwrap().success()));
    let log = fs::read_to_string(world.on_host("log")).unwrap();
    let mut lines: Vec<_> = log.lines().map(str::to_owned).collect();
    let mut wanted: Vec<_> =
        ["one", "two"].iter().flat_map(|name| (1..=400).map(move |n| format!("{name}-{n}"))).collect();
    lines.sort();
    wanted.sort();
    assert_eq!(lines, wanted);
}

#[test]
fn many_at_once_do_not_mix() {
    let world = World::new();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let folder = world.in_guest(format!("folder-{thread}"));
            scope.spawn(move || {
                fs::create_dir(&folder).unwrap();
                for n in 0..20 {
                    let data = bytes(thread * 1000 + n, 1000 * (n as usize + 1) * (thread as usize + 1));
                    let path = folder.join(format!("file-{n}"));
                    let mut file = File::create(&path).unwrap();
                    data.chunks(7001).for_each(|piece| file.write_all(piece).unwrap());
                    file.seek(SeekFrom::Start(0)).unwrap();
                    assert_eq!(hash(&fs::read(&path).unwrap()), hash(&data));
                    fs::rename(&path, folder.join(format!("done-{n}"))).unwrap();
                }
                assert_eq!(fs::read_dir(&folder).unwrap().count(), 20);
            });
        }
    });
    for thread in 0..8u64 {
        for n in 0..20 {
            let data = bytes(thread * 1000 + n, 1000 * (n as usize + 1) * (thread as usize + 1));
            let path = world.on_host(format!("folder-{thread}/done-{n}"));
            assert_eq!(hash(&fs::read(path).unwrap()), hash(&data));
        }
    }
}
