//! Images of running services (`kho.live`): a reader locks the generation that it reads, and the image's owner keeps it.
//!
//! `python/kho/live/file/pins.py` has the protocol, `python/kho/live/file/header.py` the layout; both say why it is sound. Here is the
//! reader's part, for everything that opens such a file as a core. What is opened shows one generation for as long as it is
//! open, however often the owner commits: the word that leads to the committed root FDT is that of the generation that is
//! locked.

#![forbid(unsafe_code)]

use super::backing::{Store, data_in};
#[cfg(target_os = "linux")]
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const SUPER_AT: u64 = 4096;
const SUPER_MAGIC: &[u8; 8] = b"kho-live";
const FORMAT: u32 = 2;
const SLOTS_AT: [u64; 2] = [4608, 5120];
const SLOT_MAGIC: &[u8; 8] = b"kho-root";
/// The byte that readers of generation 0 lock.
#[cfg(target_os = "linux")]
const READERS: u64 = 1 << 62;
const GENERATIONS: u64 = 1 << 59;
/// How often another generation may be committed while one is being locked.
const RETRIES: usize = 1000;

/// A file of an image whose committed generation is locked, by this very descriptor.
struct Pinned {
    file: File,
    /// Where the word is, and what it was when that generation was committed.
    word_at: u64,
    word: [u8; 8],
}

impl Store for Pinned {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, offset)?;
        for (at, byte) in (self.word_at..).zip(self.word) {
            let seen = at.checked_sub(offset).and_then(|at| buf.get_mut(usize::try_from(at).ok()?));
            if let Some(seen) = seen {
                *seen = byte;
            }
        }
        Ok(())
    }

    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        data_in(&self.file, within)
    }
}

/// The file as it is read: with the committed generation locked, if it is an image. Where the file system has no such locks,
/// or nothing is committed, it is read as any other.
pub(super) fn store(file: File) -> Box<dyn Store> {
    match pin(&file) {
        Some((word_at, word)) => Box::new(Pinned { file, word_at, word }),
        None => Box::new(file),
    }
}

fn bytes<const N: usize>(file: &File, at: u64) -> Option<[u8; N]> {
    let mut buf = [0; N];
    FileExt::read_exact_at(file, &mut buf, at).ok()?;
    Some(buf)
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The generation that is committed and the word that leads to it, if both are there at this moment.
fn committed(file: &File, word_at: u64) -> Option<(u64, [u8; 8])> {
    let word = bytes::<8>(file, word_at)?;
    SLOTS_AT.iter().find_map(|&at| {
        let slot = bytes::<24>(file, at)?;
        let generation = number(&slot, 8)?;
        let leads = slot.starts_with(SLOT_MAGIC) && slot[16..] == word && word != [0; 8];
        (leads && generation < GENERATIONS).then_some((generation, word))
    })
}

fn pin(file: &File) -> Option<(u64, [u8; 8])> {
    let sup = bytes::<24>(file, SUPER_AT)?;
    let word_at = number(&sup, 16)?;
    if !sup.starts_with(SUPER_MAGIC) || sup[8..12] != FORMAT.to_le_bytes() || word_at > SUPER_AT - 8 {
        return None;
    }
    let mut before = None;
    for _ in 0..RETRIES {
        let now = committed(file, word_at);
        let Some((generation, word)) = now else {
            // A commit may be going on; a file whose word stays the same and leads to no slot is not an owner's.
            if before.replace(bytes::<8>(file, word_at)?) == Some(bytes::<8>(file, word_at)?) {
                return None;
            }
            continue;
        };
        lock(file, libc::F_RDLCK, generation)?;
        if committed(file, word_at) == now {
            return Some((word_at, word));
        }
        lock(file, libc::F_UNLCK, generation)?;
    }
    None
}

/// Locks, or unlocks, the byte of a generation; None without locks of open file descriptions, which are of Linux only.
#[cfg(not(target_os = "linux"))]
fn lock(_file: &File, _kind: libc::c_short, _generation: u64) -> Option<()> {
    None
}

/// Locks, or unlocks, the byte of a generation; None without locks of open file descriptions.
#[cfg(target_os = "linux")]
fn lock(file: &File, kind: libc::c_int, generation: u64) -> Option<()> {
    let lock = libc::flock {
        l_type: kind.try_into().ok()?,
        l_whence: libc::SEEK_SET.try_into().ok()?,
        l_start: (READERS + generation).try_into().ok()?,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).ok().map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn image(word: u64, slots: [(u64, u64); 2]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&word.to_le_bytes(), 200).unwrap();
        file.write_all_at(
            &[&SUPER_MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4], &200u64.to_le_bytes()].concat(),
            SUPER_AT,
        )
        .unwrap();
        for ((generation, fdt), at) in slots.into_iter().zip(SLOTS_AT) {
            file.write_all_at(&[&SLOT_MAGIC[..], &generation.to_le_bytes(), &fdt.to_le_bytes()].concat(), at).unwrap();
        }
        file
    }

    #[test]
    fn what_is_open_shows_the_word_of_the_generation_it_locked() {
        let file = image(0x5000, [(4, 0x5000), (3, 0x7000)]);
        let other = file.try_clone().unwrap();
        let store = store(file);
        other.write_all_at(&0x9000u64.to_le_bytes(), 200).unwrap();
        for (at, len) in [(0, 4096), (196, 8), (200, 8), (203, 1), (205, 300)] {
            let mut seen = vec![0; len];
            store.read_exact_at(at as u64, &mut seen).unwrap();
            let mut whole = [0; 4400];
            whole[200..208].copy_from_slice(&0x5000u64.to_le_bytes());
            assert_eq!(seen, &whole[at..at + len], "{at}");
        }
    }

    #[test]
    fn a_file_that_no_slot_explains_is_read_as_it_is() {
        for file in
            [image(0x5000, [(4, 0x6000), (3, 0x7000)]), image(0, [(4, 0), (3, 0)]), image(1, [(1 << 60, 1), (3, 7)])]
        {
            assert_eq!(pin(&file), None);
        }
    }
}
