//! LiME, the format of the Linux Memory Extractor: ranges of memory, each after a header with its addresses.
//!
//! ```text
//! "EMiL" version 1 | first | last, inclusive | 8 reserved bytes | last - first + 1 bytes | the next header ...
//! ```

#![forbid(unsafe_code)]

use crate::error::{Result, SourceProblem};
use crate::memory::backing::{Backing, Segment};
use crate::memory::part::Cut;
use crate::memory::{Coverage, PhysRange, Room};
use crate::units::Phys;

const MAGIC: [u8; 4] = *b"EMiL";
const HEADER: usize = 32;
/// How messages name a range.
pub(crate) const RANGE: &str = "LiME range";

pub(crate) fn is_lime(file: &Backing) -> bool {
    let mut magic = [0; MAGIC.len()];
    file.store.read_exact_at(0, &mut magic).is_ok() && magic == MAGIC
}

/// The ranges, disjoint: of memory that is there twice, the first is taken. The last one may be cut off; where the file
/// ends within a header, what follows is not known.
///
/// # Errors
/// [`SourceProblem::Segment`] for an invalid header.
pub(crate) fn parse(file: &Backing) -> Result<(Vec<Segment>, Vec<Cut>)> {
    let (mut segments, mut cuts) = (Vec::new(), Vec::new());
    let mut taken = Coverage::default();
    let mut at = 0;
    for index in 0.. {
        let wrong = |why| file.error(SourceProblem::Segment { kind: RANGE, index, why });
        if at >= file.size {
            break;
        }
        if file.size - at < HEADER as u64 {
            if segments.is_empty() {
                return Err(wrong(format!("its header at {at:#x} is cut off at {:#x}", file.size)));
            }
            let missing = PhysRange { start: Phys(u64::MAX), len: 0 };
            cuts.push(Cut { path: file.path.as_path().into(), claim: format!("{RANGE} {index}").into(), missing });
            break;
        }
        let mut header = [0; HEADER];
        file.store.read_exact_at(at, &mut header).map_err(|e| file.error(SourceProblem::Io(e)))?;
        let half = |at: usize| header[at..].first_chunk().map_or(0, |b| u32::from_le_bytes(*b));
        let word = |at: usize| header[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
        if !header.starts_with(&MAGIC) || half(4) != 1 {
            let (magic, version) = (half(0), half(4));
            return Err(wrong(format!(
                "magic {magic:#x}, version {version} at {at:#x}, where 0x4c694d45, 1 are known"
            )));
        }
        let (first, last) = (word(8), word(16));
        let Some(len) = last.checked_sub(first).and_then(|more| more.checked_add(1)) else {
            return Err(wrong(format!("memory from {first:#x} to {last:#x}")));
        };
        let offset = at + HEADER as u64;
        let whole = Segment { first, len, offset, filled: len, index: u32::try_from(index).ok(), backing: 0 };
        segments.extend(taken.take(first, last).into_iter().map(|(a, b)| whole.part(a, b)));
        let most = Room::new(file.held).items();
        if segments.len() as u64 > most {
            return Err(wrong(format!("more than {most} ranges, which a file of {:#x} bytes cannot fill", file.held)));
        }
        at = offset.saturating_add(len);
    }
    Ok((segments, cuts))
}
