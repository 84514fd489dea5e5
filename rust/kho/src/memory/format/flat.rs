//! makedumpfile's flattened form: a dump written to a pipe, as records that say where in the file each belongs. QEMU
//! writes its kdump files this way too.
//!
//! ```text
//! 4096 bytes                                record                      ...  end
//! "makedumpfile" 0000  type 1  version 1    offset, size | size bytes        -1, -1      all big-endian
//! ```
//!
//! What a later record writes replaces what an earlier one wrote there; what none writes is zeros.

#![forbid(unsafe_code)]

use crate::error::{Result, SourceProblem};
use crate::memory::backing::{Backing, Store};
use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";
const HEADER: u64 = 4096;
const RECORD: usize = 16;
/// What is read at a time while the records are walked.
const WINDOW: usize = 1 << 16;

/// Where a run of the rearranged file lies in the flattened one.
#[derive(Clone, Copy)]
struct Piece {
    end: u64,
    at: u64,
}

struct Flat {
    file: Backing,
    /// By start; disjoint.
    pieces: BTreeMap<u64, Piece>,
    /// Whether its records have the end they are written with: what none of them wrote is zeros then, else missing.
    whole: bool,
}

pub(crate) fn is_flat(file: &Backing) -> bool {
    let mut signature = [0; SIGNATURE.len()];
    file.store.read_exact_at(0, &mut signature).is_ok() && signature == *SIGNATURE
}

/// The rearranged file. One that is cut short ends where its records do.
///
/// # Errors
/// [`SourceProblem::Dump`] for another type or version, or a record that cannot be.
pub(crate) fn unflatten(file: Backing) -> Result<Backing> {
    let wrong = |why: String| file.error(SourceProblem::Dump { why });
    let mut header = [0; 32];
    file.store.read_exact_at(0, &mut header).map_err(|e| file.error(SourceProblem::Io(e)))?;
    let (kind, version) = (be64(&header[16..]), be64(&header[24..]));
    if (kind, version) != (1, 1) {
        return Err(wrong(format!("flattened file of type {kind}, version {version}, where 1 and 1 are known")));
    }
    let mut pieces = BTreeMap::new();
    let (mut at, mut size, mut whole) = (HEADER, 0, false);
    let mut window = Window { start: 0, bytes: Vec::new() };
    while at < file.size {
        let Some(record) = window.record(&file, at)? else { break };
        let (offset, len) = (be64(&record), be64(&record[8..]));
        if offset < 0 || len < 0 {
            if (offset, len) == (-1, -1) {
                whole = true;
                break;
            }
            return Err(wrong(format!("record at {at:#x}: offset {offset}, size {len}")));
        }
        let (offset, len) = (offset.cast_unsigned(), len.cast_unsigned());
        at += RECORD as u64;
        let here = len.min(file.size - at.min(file.size));
        if here > 0 {
            // Both are below 2^63.
            let end = offset + here;
            write(&mut pieces, offset, Piece { end, at });
            size = size.max(end);
        }
        at = at.saturating_add(len);
    }
    if pieces.is_empty() {
        let cut = if whole { "" } else { ": it is cut off" };
        return Err(wrong(format!("flattened file without a record{cut}")));
    }
    let (path, held) = (file.path.clone(), file.held);
    Ok(Backing { path, size, held, store: Box::new(Flat { file, pieces, whole }) })
}

fn be64(bytes: &[u8]) -> i64 {
    bytes.first_chunk().map_or(0, |b| i64::from_be_bytes(*b))
}

/// Puts a piece over what is there.
fn write(pieces: &mut BTreeMap<u64, Piece>, start: u64, piece: Piece) {
    if let Some((&first, &old)) = pieces.range(..start).next_back()
        && old.end > start
    {
        pieces.insert(first, Piece { end: start, at: old.at });
        if old.end > piece.end {
            pieces.insert(piece.end, Piece { end: old.end, at: old.at + (piece.end - first) });
        }
    }
    while let Some((&first, &old)) = pieces.range(start..piece.end).next() {
        pieces.remove(&first);
        if old.end > piece.end {
            pieces.insert(piece.end, Piece { end: old.end, at: old.at + (piece.end - first) });
        }
    }
    pieces.insert(start, piece);
}

/// What was read ahead, since records may be short.
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// The 16 bytes at `at`; none if the file ends before.
    fn record(&mut self, file: &Backing, at: u64) -> Result<Option<[u8; RECORD]>> {
        let found = |w: &Window| {
            let skip = usize::try_from(at.checked_sub(w.start)?).ok()?;
            w.bytes.get(skip..)?.first_chunk().copied()
        };
        if let Some(record) = found(self) {
            return Ok(Some(record));
        }
        let n = usize::try_from(file.size - at).map_or(WINDOW, |left| left.min(WINDOW));
        self.bytes.resize(n, 0);
        self.start = at;
        file.store.read_exact_at(at, &mut self.bytes).map_err(|e| file.error(SourceProblem::Io(e)))?;
        Ok(found(self))
    }
}

impl Flat {
    /// The first piece that ends after `offset`.
    fn from(&self, offset: u64) -> impl Iterator<Item = (u64, Piece)> {
        let before = self.pieces.range(..=offset).next_back().filter(|(_, p)| p.end > offset);
        let first = before.map_or(offset, |(&start, _)| start);
        self.pieces.range(first..).map(|(&start, &piece)| (start, piece))
    }
}

impl Store for Flat {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        let end = offset.checked_add(buf.len() as u64).ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut at = offset;
        for (start, piece) in self.from(offset).take_while(|(start, _)| *start < end) {
            let (a, b) = (start.max(offset), piece.end.min(end));
            if a > at && !self.whole {
                break;
            }
            at = b;
            // Inside `buf`.
            let within = (a - offset) as usize..(b - offset) as usize;
            self.file.store.read_exact_at(piece.at + (a - start), &mut buf[within])?;
        }
        if at < end && !self.whole {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        if !self.whole {
            return Some(within);
        }
        let (start, piece) = self.from(within.start).next().filter(|(start, _)| *start < within.end)?;
        Some(start.max(within.start)..piece.end.min(within.end))
    }
}
