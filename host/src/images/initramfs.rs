//! The initramfs of a start: the image's own, with the agent's cpio behind it.
//!
//! The kernel unpacks concatenated archives in order (`Documentation/driver-api/early-userspace/
//! buffer-format.rst`): so a new `dhow` always boots its own agent.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use cpio::newc::Builder;

/// An archive may begin only at a multiple of this, in bytes.
const ALIGNMENT: u64 = 4;

/// Writes `image` (an archive, compressed or not) and the agent as `/init` to `target`, which is
/// replaced. The memory of the guest holds it all until the agent has changed its root.
///
/// # Errors
/// As reading and writing files fail.
pub fn compose(image: &Path, agent: &Path, target: &Path) -> io::Result<()> {
    let mut out = File::create(target)?;
    let written = io::copy(&mut File::open(image)?, &mut out)?;
    let padding = (ALIGNMENT - written % ALIGNMENT) % ALIGNMENT;
    out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
    let agent = std::fs::read(agent)?;
    let size = u32::try_from(agent.len()).map_err(io::Error::other)?;
    // S_IFREG | 0755
    let mut entry = Builder::new("init").mode(0o100_755).nlink(1).write(out, size);
    entry.write_all(&agent)?;
    let out = entry.finish()?;
    cpio::newc::trailer(out)?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn the_agent_follows_the_image_at_a_multiple_of_four() {
        let dir = tempfile::tempdir().unwrap();
        let (image, agent, target) = (dir.path().join("i"), dir.path().join("a"), dir.path().join("t"));
        std::fs::write(&image, b"12345").unwrap();
        std::fs::write(&agent, b"ELF").unwrap();
        compose(&image, &agent, &target).unwrap();
        let bytes = std::fs::read(&target).unwrap();
        assert_eq!(&bytes[..8], b"12345\0\0\0");
        let mut entry = cpio::newc::Reader::new(&bytes[8..]).unwrap();
        assert_eq!((entry.entry().name(), entry.entry().mode()), ("init", 0o100_755));
        let mut body = Vec::new();
        entry.read_to_end(&mut body).unwrap();
        assert_eq!(body, b"ELF");
    }
}
