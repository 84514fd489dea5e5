//! Decompresses a page of a dump. The output never exceeds one page.

#![forbid(unsafe_code)]

mod lzo;

use ruzstd::decoding::FrameDecoder;
use std::cell::RefCell;
use std::fmt;

/// The packing of one page (`flags` of a page descriptor, makedumpfile's diskdump_mod.h).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Codec {
    Stored,
    Zlib,
    Lzo,
    Snappy,
    Zstd,
}

impl Codec {
    /// The one a descriptor's flags name; none if they name several or one that there is not.
    pub(crate) const fn of_flags(flags: u32) -> Option<Self> {
        const ZLIB: u32 = 0x1;
        const LZO: u32 = 0x2;
        const SNAPPY: u32 = 0x4;
        const ZSTD: u32 = 0x20;
        match flags {
            0 => Some(Codec::Stored),
            ZLIB => Some(Codec::Zlib),
            LZO => Some(Codec::Lzo),
            SNAPPY => Some(Codec::Snappy),
            ZSTD => Some(Codec::Zstd),
            _ => None,
        }
    }

    /// Fills `page` from its packed form, exactly.
    pub(crate) fn unpack(self, packed: &[u8], page: &mut [u8]) -> Result<(), String> {
        let filled = match self {
            Codec::Stored => {
                let n = packed.len().min(page.len());
                page[..n].copy_from_slice(&packed[..n]);
                packed.len()
            }
            Codec::Zlib => zlib(packed, page)?,
            Codec::Lzo => lzo::unpack(packed, page).map_err(str::to_owned)?,
            Codec::Snappy => snappy(packed, page)?,
            Codec::Zstd => zstd(packed, page)?,
        };
        if filled != page.len() {
            return Err(format!("{filled:#x} bytes, where a page has {:#x}", page.len()));
        }
        Ok(())
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Codec::Stored => "stored",
            Codec::Zlib => "zlib",
            Codec::Lzo => "lzo",
            Codec::Snappy => "snappy",
            Codec::Zstd => "zstd",
        })
    }
}

fn zlib(packed: &[u8], page: &mut [u8]) -> Result<usize, String> {
    miniz_oxide::inflate::decompress_slice_iter_to_slice(page, std::iter::once(packed), true, false)
        .map_err(|status| format!("not a page's zlib stream ({status:?})"))
}

fn snappy(packed: &[u8], page: &mut [u8]) -> Result<usize, String> {
    let claimed = snap::raw::decompress_len(packed).map_err(|e| e.to_string())?;
    if claimed != page.len() {
        return Ok(claimed);
    }
    snap::raw::Decoder::new().decompress(packed, page).map_err(|e| e.to_string())
}

fn zstd(packed: &[u8], page: &mut [u8]) -> Result<usize, String> {
    /// Far more than a frame of one page asks for, and no reason to run out of memory.
    const MAX_WINDOW: u64 = 8 << 20;
    thread_local! {
        // Its tables are larger than a page.
        static DECODER: RefCell<FrameDecoder> = RefCell::new({
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(MAX_WINDOW);
            decoder
        });
    }
    DECODER.with_borrow_mut(|decoder| decoder.decode_all(packed, page)).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests;
