//! Decompresses files and streams into an unlinked temporary file, within a limit.
//!
//! A stream that unpacks to zeros costs no room, since zeros are left out of the file; so a limit is needed on how many
//! bytes come out, and one on how many are written. Decoders hold 64 MiB at most ([`WINDOW`]).

#![forbid(unsafe_code)]

use super::backing::{Backing, Store, data_in};
use super::format::foreign::{self, HEAD, Packing};
use crate::error::{Error, Result, SourceProblem};
use crate::sizes::{Bytes, parse_size};
use rustix::event::{PollFd, PollFlags, poll};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::marker::PhantomData;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The largest window (dictionary) of zstd and xz that is decoded, in bytes: what `xz -9` asks for.
const WINDOW: u64 = 64 << 20;
/// Bytes decoded at a time. As many zeros are left out of the file.
const BLOCK: usize = 1 << 16;
/// Bytes between two reports of progress.
const REPORTED: u64 = 1 << 20;
/// Bytes that may come out of any packed file, and how many times its own size: memory of zeros packs 1000 to 1, but time
/// goes with the bytes of a file, not with what they can be made to unpack to.
const LIMIT: (u64, u64) = (2 << 30, 128);
/// The same for bzip2 and xz, which unpack zeros five to ten times slower.
const SLOW_LIMIT: (u64, u64) = (512 << 20, 64);
/// Bytes of a stream that is not packed.
const STREAM_LIMIT: u64 = 1 << 40;
/// How long a FIFO without a writer is waited for.
const WRITER: Duration = Duration::from_secs(1);
/// How long a wait for a stream's bytes goes without a look at signals.
const TICK: Duration = Duration::from_millis(50);

/// The environment variable with the number of bytes that a packed file or a stream may come to.
pub const LIMIT_VARIABLE: &str = "KHO_UNPACK_LIMIT";

/// What unpacking may take, and who is told how many bytes there are.
pub(crate) struct Work<'a> {
    limit: Option<u64>,
    told: RefCell<&'a mut (dyn FnMut(u64) -> Result<()> + Send)>,
    /// Bytes of all sources that are there.
    done: Cell<u64>,
}

impl<'a> Work<'a> {
    /// `limit` is in bytes; if there is none, `KHO_UNPACK_LIMIT` is, and else what [`most`] says.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a variable that is no number.
    pub(crate) fn new(limit: Option<u64>, told: &'a mut (dyn FnMut(u64) -> Result<()> + Send)) -> Result<Self> {
        let limit = match (limit, std::env::var_os(LIMIT_VARIABLE)) {
            (Some(limit), _) => Some(limit),
            (None, None) => None,
            (None, Some(text)) => Some(
                parse_size(&text.to_string_lossy())
                    .map_err(|error| Error::Invalid { what: LIMIT_VARIABLE, why: error.to_string() })?,
            ),
        };
        Ok(Work { limit, told: RefCell::new(told), done: Cell::new(0) })
    }

    fn tell(&self, more: u64) -> Result<()> {
        self.done.set(self.done.get() + more);
        (self.told.borrow_mut())(self.done.get())
    }
}

/// A packed file's content as a file; `packing` is what the file begins as.
///
/// # Errors
/// [`SourceProblem::Packed`] for a damaged file, one that comes to more than the limit, or no room; [`Error::Source`] for
/// a file in it that is no memory.
pub(crate) fn unpack(file: Backing, packing: Packing, work: &Work<'_>) -> Result<Backing> {
    let path = file.path.clone();
    let size = file.size;
    let reader = BufReader::with_capacity(BLOCK, StoreReader { file, at: 0 });
    decode(&path, reader, packing, &|| size, work)
}

/// A stream's content as a file, unpacked where `unpacked` says so.
///
/// # Errors
/// As [`unpack`]; [`SourceProblem::Empty`] for a stream that ends before its first byte.
pub(crate) fn spool(path: &Path, stream: File, work: &Work<'_>) -> Result<Backing> {
    let fail = |problem| Error::Source { path: path.to_path_buf(), problem };
    let mut stream = Stream { file: stream, path, work, opened: Instant::now(), written: false };
    let head = read_head(&mut stream).map_err(|e| failed(path, None, e))?;
    if head.is_empty() {
        return Err(fail(SourceProblem::Empty));
    }
    let packing = Packing::of(&head);
    let whole = BufReader::with_capacity(BLOCK, Cursor::new(head).chain(stream));
    match packing {
        Some(packing) => {
            let count = Cell::new(0);
            let counted = BufReader::with_capacity(BLOCK, Counted { inner: whole, count: &count });
            decode(path, counted, packing, &|| count.get(), work)
        }
        None => {
            let (file, size, written) = store(path, whole, None, &|| work.limit.unwrap_or(STREAM_LIMIT), work)?;
            Ok(Backing { path: path.to_path_buf(), store: Box::new(file), size, held: written })
        }
    }
}

/// Decodes into a file; `packed` says how many packed bytes there are, or were read so far.
fn decode<R: BufRead>(
    path: &Path,
    reader: R,
    packing: Packing,
    packed: &dyn Fn() -> u64,
    work: &Work<'_>,
) -> Result<Backing> {
    let mut decoder = decoder(reader, packing);
    let head = read_head(&mut *decoder).map_err(|e| failed(path, Some(packing), e))?;
    let problem = |why| Error::Source {
        path: path.to_path_buf(),
        problem: SourceProblem::Packed { packing: packing.to_string(), why },
    };
    if head.is_empty() {
        return Err(problem("nothing is packed in it".into()));
    }
    if let Some(inner) = Packing::of(&head) {
        return Err(problem(format!(
            "what is packed in it is packed again, with {inner}: unpack it first ({})",
            packing.command()
        )));
    }
    if let Some(found) = foreign::recognize(&head) {
        let problem =
            SourceProblem::Foreign { what: format!("packed with {packing}: {}", found.what), remedy: found.remedy };
        return Err(Error::Source { path: path.to_path_buf(), problem });
    }
    let whole = Cursor::new(head).chain(decoder);
    let limit = || work.limit.unwrap_or_else(|| most(packing, packed()));
    let (file, size, written) = store(path, whole, Some(packing), &limit, work)?;
    // What a reader allocates goes with the packed bytes: a few of them can be made to unpack to any number of others.
    let held = written.min(packed());
    Ok(Backing { path: path.to_path_buf(), store: Box::new(Unpacked { file, packing }), size, held })
}

/// The decoder of a packing.
fn decoder<'r, R: BufRead + 'r>(reader: R, packing: Packing) -> Box<dyn Read + 'r> {
    match packing {
        Packing::Gzip => Box::new(Members::<_, flate2::bufread::GzDecoder<_>>::new(reader, b"\x1f\x8b")),
        Packing::Xz => {
            // The dictionary, and what the reader needs besides.
            let kib = (WINDOW >> 10) as u32 + 1024;
            Box::new(lzma_rust2::XzReader::new_mem_limit(reader, true, kib))
        }
        Packing::Zstd => Box::new(Zstd::new(reader)),
        Packing::Bzip2 => Box::new(Members::<_, bzip2::bufread::BzDecoder<_>>::new(reader, b"BZh")),
        Packing::Lz4 => Box::new(Lz4(lz4_flex::frame::FrameDecoder::new(reader))),
        Packing::Snappy => Box::new(snap::read::FrameDecoder::new(reader)),
        Packing::Avml => Box::new(Avml { state: Block::Header(reader), index: 0, header: Cursor::new(Vec::new()) }),
    }
}

/// What a byte string is packed from, up to `limit` bytes; what comes before damage, or before bytes that follow the
/// stream: a kernel's payload is followed by its size. `path` is for messages.
///
/// # Errors
/// [`SourceProblem::Packed`] if nothing comes out of it; [`Error::Invalid`] for bytes that no known packing begins with.
pub fn unpack_bytes(path: &Path, packed: &[u8], limit: usize) -> Result<Vec<u8>> {
    let Some(packing) = Packing::of(packed) else {
        let why = "not packed with gzip, xz, zstd, bzip2, lz4 or snappy".to_owned();
        return Err(Error::Invalid { what: "payload", why });
    };
    let mut decoder = decoder(Cursor::new(packed), packing);
    let mut whole = Vec::new();
    let mut block = vec![0; BLOCK];
    while whole.len() < limit {
        let most = block.len().min(limit - whole.len());
        match decoder.read(&mut block[..most]) {
            Ok(0) => break,
            Ok(n) => whole.extend_from_slice(&block[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if whole.is_empty() => return Err(failed(path, Some(packing), e)),
            Err(_) => break,
        }
    }
    Ok(whole)
}

/// Bytes that may come out of `packed` bytes, if nothing else is asked for.
fn most(packing: Packing, packed: u64) -> u64 {
    let (least, ratio) = match packing {
        Packing::Bzip2 | Packing::Xz => SLOW_LIMIT,
        _ => LIMIT,
    };
    packed.saturating_mul(ratio).max(least)
}

/// What was packed, in an unlinked file.
struct Unpacked {
    file: File,
    packing: Packing,
}

impl Store for Unpacked {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buf, offset)
    }

    fn data_in(&self, within: Range<u64>) -> Option<Range<u64>> {
        data_in(&self.file, within)
    }

    fn most_to_search(&self, held: u64) -> u64 {
        most(self.packing, held)
    }
}

/// Writes what comes out of a reader into an unlinked file, zeros left out: the file, its size, and the bytes written.
fn store(
    path: &Path,
    mut reader: impl Read,
    packing: Option<Packing>,
    limit: &dyn Fn() -> u64,
    work: &Work<'_>,
) -> Result<(File, u64, u64)> {
    static ZEROS: [u8; BLOCK] = [0; BLOCK];
    let folder = std::env::temp_dir();
    let no_room = |why: String| {
        let packing = packing.map_or_else(|| "stream".to_owned(), |p| p.to_string());
        let problem = SourceProblem::Packed { packing, why };
        Error::Source { path: path.to_path_buf(), problem }
    };
    let io = |e: io::Error| match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            no_room(format!("{} has no room for it ({e}): set TMPDIR to a directory that has", folder.display()))
        }
        _ => no_room(format!("a temporary file in {}: {e}; TMPDIR names another directory", folder.display())),
    };
    let file = tempfile::tempfile_in(&folder).map_err(io)?;
    // Not all of what is free: others write there, too.
    let room = rustix::fs::fstatvfs(&file).map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize) / 16 * 15);
    let mut buf = vec![0; BLOCK];
    let (mut at, mut written, mut reported) = (0u64, 0u64, 0u64);
    loop {
        let n = read_full(&mut reader, &mut buf).map_err(|e| failed(path, packing, e))?;
        if n == 0 {
            break;
        }
        let (block, end) = (&buf[..n], at + n as u64);
        let limit = limit();
        if end > limit {
            let command = packing.map_or("", Packing::command);
            let how = if command.is_empty() { String::new() } else { format!(", or unpack it yourself ({command})") };
            return Err(no_room(format!(
                "more than {limit} bytes come out of it, which is the limit: set {LIMIT_VARIABLE} to a larger one (64G){how}"
            )));
        }
        if block != &ZEROS[..n] {
            written += n as u64;
            if written > room {
                return Err(no_room(format!(
                    "{} has no room for it ({room} bytes to use): set TMPDIR to a directory that has",
                    folder.display()
                )));
            }
            file.write_all_at(block, at).map_err(io)?;
        }
        at = end;
        if at - reported >= REPORTED {
            work.tell(at - reported)?;
            reported = at;
        }
    }
    file.set_len(at).map_err(io)?;
    work.tell(at - reported)?;
    Ok((file, at, written))
}

/// The error of a reader: its own, or what is wrong with what it decodes.
fn failed(path: &Path, packing: Option<Packing>, error: io::Error) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(own) => return own,
        Err(error) => error,
    };
    let problem = match packing {
        None => SourceProblem::Io(error),
        Some(packing) => {
            let what = match error.kind() {
                io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
                io::ErrorKind::OutOfMemory => format!("it needs a window of more than {}", Bytes(WINDOW)),
                _ if matches!(packing, Packing::Xz | Packing::Zstd) => {
                    format!("it is damaged, or needs more than {} to unpack ({error})", Bytes(WINDOW))
                }
                _ => format!("it is damaged ({error})"),
            };
            let why = format!("{what}: {} tells more", packing.command());
            SourceProblem::Packed { packing: packing.to_string(), why }
        }
    };
    Error::Source { path: path.to_path_buf(), problem }
}

/// The first bytes, as many as formats are recognized by.
fn read_head(reader: &mut dyn Read) -> io::Result<Vec<u8>> {
    let mut head = vec![0; HEAD];
    let n = read_full(reader, &mut head)?;
    head.truncate(n);
    Ok(head)
}

/// Fills `buf`, or as much of it as there is.
fn read_full(reader: &mut (impl Read + ?Sized), buf: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buf.len() {
        match reader.read(&mut buf[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

/// A file from its beginning to its end.
struct StoreReader {
    file: Backing,
    at: u64,
}

impl Read for StoreReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.file.size - self.at;
        let n = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
        self.file.store.read_exact_at(self.at, &mut buf[..n])?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Counts what is read.
struct Counted<'a, R> {
    inner: R,
    count: &'a Cell<u64>,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.count.set(self.count.get() + n as u64);
        Ok(n)
    }
}

/// A pipe. Waits for bytes in turns, so that a signal ends the wait.
struct Stream<'a, 'w> {
    file: File,
    path: &'a Path,
    work: &'a Work<'w>,
    opened: Instant,
    /// Whether it has, or had, a writer.
    written: bool,
}

impl Read for Stream<'_, '_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.work.tell(0).map_err(io::Error::other)?;
            let ticks = rustix::event::Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
            let mut wanted = [PollFd::new(&self.file, PollFlags::IN)];
            let ready = match poll(&mut wanted, Some(&ticks)) {
                Ok(ready) => ready > 0,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(e.into()),
            };
            // A FIFO that no process has opened for writing yet reads as ended, and is never ready.
            if !ready && self.written {
                continue;
            }
            match self.file.read(buf) {
                Ok(0) if !ready => {
                    if self.opened.elapsed() > WRITER {
                        return Err(io::Error::other(Error::Source {
                            path: PathBuf::from(self.path),
                            problem: SourceProblem::NoWriter,
                        }));
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.written = true,
                done => {
                    self.written = true;
                    return done;
                }
            }
        }
    }
}

/// zstd frames, one after the other, skippable ones left out.
struct Zstd<R> {
    source: R,
    decoder: ruzstd::decoding::FrameDecoder,
    /// Whether a frame was begun whose end was not checked.
    open: bool,
}

impl<R: BufRead> Zstd<R> {
    fn new(source: R) -> Self {
        let mut decoder = ruzstd::decoding::FrameDecoder::new();
        decoder.set_max_window_size(WINDOW);
        Zstd { source, decoder, open: false }
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        use ruzstd::decoding::BlockDecodingStrategy::UptoBytes;
        use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
        let damaged = |e: FrameDecoderError| io::Error::new(io::ErrorKind::InvalidData, e.to_string());
        loop {
            if self.open {
                let n = self.decoder.read(buf)?;
                if n > 0 || buf.is_empty() {
                    return Ok(n);
                }
                if !self.decoder.is_finished() {
                    let more = UptoBytes(BLOCK);
                    self.decoder
                        .decode_blocks(&mut self.source, more)
                        .map_err(|e| short(&mut self.source, damaged(e)))?;
                    continue;
                }
                if let Some(stored) = self.decoder.get_checksum_from_data()
                    && self.decoder.get_calculated_checksum() != Some(stored)
                {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "its checksum does not match"));
                }
                self.open = false;
            }
            if self.source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            match self.decoder.reset(&mut self.source) {
                Ok(()) => self.open = true,
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    let skipped = io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                    if skipped < u64::from(length) {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(e) => return Err(short(&mut self.source, damaged(e))),
            }
        }
    }
}

/// The same error, or that the source ended: a decoder that asked for more than there is.
fn short(source: &mut impl BufRead, error: io::Error) -> io::Error {
    match source.fill_buf() {
        Ok([]) => io::ErrorKind::UnexpectedEof.into(),
        Ok(_) => error,
        Err(own) => own,
    }
}

/// A decoder of one gzip or bzip2 stream.
trait Member<R>: Read {
    fn open(source: R) -> Self;
    fn close(self) -> R;
}

impl<R: BufRead> Member<R> for flate2::bufread::GzDecoder<R> {
    fn open(source: R) -> Self {
        Self::new(source)
    }

    fn close(self) -> R {
        self.into_inner()
    }
}

impl<R: BufRead> Member<R> for bzip2::bufread::BzDecoder<R> {
    fn open(source: R) -> Self {
        Self::new(source)
    }

    fn close(self) -> R {
        self.into_inner()
    }
}

/// Streams of gzip or bzip2, one after the other. Bytes after the last one that begin no other are left out, as gzip and
/// bzip2 do: tapes and block devices pad with zeros.
struct Members<R, D> {
    decoder: Option<D>,
    magic: &'static [u8],
    source: PhantomData<R>,
}

impl<R: BufRead, D: Member<R>> Members<R, D> {
    fn new(source: R, magic: &'static [u8]) -> Self {
        Members { decoder: Some(D::open(source)), magic, source: PhantomData }
    }
}

impl<R: BufRead, D: Member<R>> Read for Members<R, D> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while let Some(mut decoder) = self.decoder.take() {
            let read = decoder.read(buf);
            if buf.is_empty() || !matches!(read, Ok(0)) {
                self.decoder = Some(decoder);
                return read;
            }
            let mut source = decoder.close();
            // A buffer may end within the magic: then the decoder judges the rest of it.
            let ahead = source.fill_buf()?;
            let seen = ahead.len().min(self.magic.len());
            if seen == 0 || ahead[..seen] != self.magic[..seen] {
                return Ok(0);
            }
            self.decoder = Some(D::open(source));
        }
        Ok(0)
    }
}

/// lz4 frames, one after the other: the decoder stops after each.
struct Lz4<R: Read>(lz4_flex::frame::FrameDecoder<R>);

impl<R: BufRead> Read for Lz4<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.0.read(buf)?;
            if n > 0 || buf.is_empty() || self.0.get_mut().fill_buf()?.is_empty() {
                return Ok(n);
            }
        }
    }
}

/// AVML's version 2 as LiME: each block is LiME's header with another magic, the memory in snappy frames, and how many
/// bytes those are (microsoft/avml, src/image.rs).
struct Avml<R: Read> {
    state: Block<R>,
    /// The block's number.
    index: u64,
    /// What is left of the header that goes out.
    header: Cursor<Vec<u8>>,
}

enum Block<R: Read> {
    Header(R),
    /// Bytes of memory that are still to come.
    Body(snap::read::FrameDecoder<R>, u64),
    End,
}

impl<R: BufRead> Read for Avml<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let n = self.header.read(buf)?;
            if n > 0 || buf.is_empty() {
                return Ok(n);
            }
            self.state = match std::mem::replace(&mut self.state, Block::End) {
                Block::End => return Ok(0),
                Block::Header(mut source) => {
                    if source.fill_buf()?.is_empty() {
                        return Ok(0);
                    }
                    let mut header = [0; 32];
                    source.read_exact(&mut header)?;
                    let word = |at: usize| header[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
                    let len = word(16).checked_sub(word(8)).and_then(|more| more.checked_add(1));
                    let (true, Some(len)) = (header.starts_with(b"AVML\x02\0\0\0"), len) else {
                        let what = format!("block {} has no header of AVML's version 2", self.index);
                        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
                    };
                    self.index += 1;
                    header[..8].copy_from_slice(b"EMiL\x01\0\0\0");
                    self.header = Cursor::new(header.to_vec());
                    Block::Body(snap::read::FrameDecoder::new(source), len)
                }
                Block::Body(decoder, 0) => {
                    let mut source = decoder.into_inner();
                    source.read_exact(&mut [0; 8])?;
                    Block::Header(source)
                }
                Block::Body(mut decoder, left) => {
                    let most = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
                    let n = decoder.read(&mut buf[..most])?;
                    if n == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.state = Block::Body(decoder, left - n as u64);
                    return Ok(n);
                }
            };
        }
    }
}
