//! LZO1X, unpacked into a buffer of known size (the stream is described in Documentation/staging/lzo.rst).
//!
//! ```text
//! instruction byte   copies from the output                      then literals
//! 0000LLLL  (state 0)  nothing: 3 + L literals, or longer        state 4
//! 0000DDSS  (state 1-3) 2 bytes, 1 + (H << 2) + D back           S
//! 0000DDSS  (state 4)  3 bytes, 2049 + (H << 2) + D back         S
//! 0001HLLL  2 + L, 16384 + (H << 14) + D back; 16384: the end    S    D, S: 16 bits after it
//! 001LLLLL  2 + L, 1 + D back                                    S    D, S: 16 bits after it
//! LLLDDDSS  1 + L, 1 + (H << 3) + D back                         S    H: 8 bits after it
//! ```
//!
//! The state is how many literals the last instruction took along, 4 for a run of them. A length of 0 goes on: 255 for
//! each zero byte, and the byte after those.

#![forbid(unsafe_code)]

type Outcome<T> = Result<T, &'static str>;

const SHORT: &str = "the lzo stream ends early";
const FULL: &str = "the lzo stream holds more than a page";

struct Stream<'a> {
    input: &'a [u8],
    out: &'a mut [u8],
    /// Bytes of `out` that are filled.
    done: usize,
}

/// Unpacks a whole stream and returns how many bytes it held.
pub(super) fn unpack(input: &[u8], out: &mut [u8]) -> Outcome<usize> {
    let mut stream = Stream { input, out, done: 0 };
    let mut state = 0;
    // Only the first byte can give a number of literals this way.
    if let Some(&first) = input.first().filter(|&&first| first > 17) {
        stream.byte()?;
        let n = usize::from(first) - 17;
        stream.literals(n)?;
        state = n.min(4);
    }
    loop {
        let byte = usize::from(stream.byte()?);
        let low = byte & 3;
        let (back, len, then) = match byte {
            0..16 if state == 0 => {
                let n = 3 + stream.length(byte, 15)?;
                stream.literals(n)?;
                state = 4;
                continue;
            }
            0..16 => {
                let near = (byte >> 2) + (usize::from(stream.byte()?) << 2);
                if state == 4 { (2049 + near, 3, low) } else { (1 + near, 2, low) }
            }
            16..32 => {
                let len = 2 + stream.length(byte & 7, 7)?;
                let word = stream.word()?;
                let far = ((byte & 8) << 11) + (word >> 2);
                if far == 0 {
                    return if stream.input.is_empty() { Ok(stream.done) } else { Err("bytes after the lzo stream") };
                }
                (0x4000 + far, len, word & 3)
            }
            32..64 => {
                let len = 2 + stream.length(byte & 31, 31)?;
                let word = stream.word()?;
                (1 + (word >> 2), len, word & 3)
            }
            _ => {
                let near = ((byte >> 2) & 7) + (usize::from(stream.byte()?) << 3);
                (1 + near, 1 + (byte >> 5), low)
            }
        };
        stream.repeat(back, len)?;
        stream.literals(then)?;
        state = then;
    }
}

impl Stream<'_> {
    fn byte(&mut self) -> Outcome<u8> {
        let (&byte, rest) = self.input.split_first().ok_or(SHORT)?;
        self.input = rest;
        Ok(byte)
    }

    fn word(&mut self) -> Outcome<usize> {
        Ok(usize::from(self.byte()?) | usize::from(self.byte()?) << 8)
    }

    /// A length that stands in the instruction, or continues after it from `most`.
    fn length(&mut self, given: usize, most: usize) -> Outcome<usize> {
        if given != 0 {
            return Ok(given);
        }
        let zeros = self.input.iter().take_while(|&&byte| byte == 0).count();
        self.input = &self.input[zeros..];
        // At most 255 times the input's length.
        Ok(most + 255 * zeros + usize::from(self.byte()?))
    }

    fn literals(&mut self, n: usize) -> Outcome<()> {
        let (taken, rest) = self.input.split_at_checked(n).ok_or(SHORT)?;
        self.out.get_mut(self.done..self.done + n).ok_or(FULL)?.copy_from_slice(taken);
        self.input = rest;
        self.done += n;
        Ok(())
    }

    /// Repeats `len` bytes from `back` bytes ago, which may be fewer than `len`: then they repeat themselves.
    fn repeat(&mut self, back: usize, len: usize) -> Outcome<()> {
        let from = self.done.checked_sub(back).ok_or("the lzo stream refers to what is before it")?;
        let end = self.done + len;
        if end > self.out.len() {
            return Err(FULL);
        }
        if back >= len {
            self.out.copy_within(from..from + len, self.done);
        } else {
            for at in self.done..end {
                self.out[at] = self.out[at - back];
            }
        }
        self.done = end;
        Ok(())
    }
}
