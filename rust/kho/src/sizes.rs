//! Sizes and addresses as users write them, and sizes as messages print them.
//!
//! ```text
//! SIZE   = NUMBER [UNIT]            spaces before, after and between them; letters in either case
//! NUMBER = 0x1000 | 4096 | 1.5      an underscore may separate two digits of a whole number
//! UNIT   = B | K | M | G | T | P | E, each but B also with B or iB: 1024 to the power of 1 to 6
//! ```
//!
//! The value is a whole number of bytes below 2^64. In a hexadecimal number B and E are digits. `kho/sizes.py` has the
//! same grammar and the same printer for Python; the tests of both read `sizes_cases.txt`. `memparse` of a kernel's
//! command line is another grammar ([`crate::cmdline`]).

#![forbid(unsafe_code)]

use core::fmt;

/// Units by powers of 1024.
const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
/// The longest text that is read, in bytes; a fraction that is a whole number of bytes has at most 60 digits.
const LONGEST: usize = 100;
/// Characters of a refused text that the message repeats.
const SHOWN: usize = 40;

/// The rule of the grammar that a text breaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeRule {
    /// It is a number with an optional unit.
    Syntax,
    /// It is not negative.
    Sign,
    /// It is a whole number of bytes.
    Whole,
    /// It is below 2^64.
    Range,
}

/// A text that is not a size or an address, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SizeError {
    /// The text, cut after 40 characters.
    pub text: String,
    /// The rule that it breaks.
    pub rule: SizeRule,
}

impl fmt::Display for SizeRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SizeRule::Syntax => "is not a number with an optional unit K, M, G, T, P or E",
            SizeRule::Sign => "is negative",
            SizeRule::Whole => "is not a whole number of bytes",
            SizeRule::Range => "is not below 2^64",
        })
    }
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {} (write 4096, 0x1000, 64K or 1.5G)", self.text, self.rule)
    }
}

impl std::error::Error for SizeError {}

/// Reads a size or an address in bytes: `4096`, `0x4000_0000`, `64K`, `1.5G`, `2 MiB`.
///
/// # Errors
/// The text with the rule of the grammar that it breaks.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    value(text).map_err(|rule| SizeError { text: text.chars().take(SHOWN).collect(), rule })
}

/// A size as the grammar divides it; the fraction is its digits alone.
struct Parts<'a> {
    radix: u32,
    whole: &'a str,
    fraction: &'a str,
    shift: u32,
}

fn value(text: &str) -> Result<u64, SizeRule> {
    let text = text.trim_matches(space);
    if text.len() > LONGEST {
        return Err(SizeRule::Syntax);
    }
    if text.strip_prefix('-').is_some_and(|rest| split(rest).is_some()) {
        return Err(SizeRule::Sign);
    }
    let Parts { radix, whole, fraction, shift } = split(text).ok_or(SizeRule::Syntax)?;
    let mut number = 0u64;
    for digit in whole.chars().filter_map(|c| c.to_digit(radix)) {
        let more = number.checked_mul(u64::from(radix)).and_then(|n| n.checked_add(u64::from(digit)));
        number = more.ok_or(SizeRule::Range)?;
    }
    let bytes = number.checked_mul(1 << shift).ok_or(SizeRule::Range)?;
    // Below `1 << shift`, to which the rest is aligned: the sum does not overflow.
    Ok(bytes + fraction_of(fraction, shift).ok_or(SizeRule::Whole)?)
}

/// `0.FRACTION << shift`, if that is whole. Exact: the decimal digits are doubled `shift` times, and what is carried out
/// of the first one is the next bit. `0.75 << 2` is .75 -> 1 and .50 -> 1 and .00, so 0b11.
fn fraction_of(fraction: &str, shift: u32) -> Option<u64> {
    let mut digits: Vec<u32> = fraction.chars().filter_map(|c| c.to_digit(10)).collect();
    let mut bits = 0;
    for _ in 0..shift {
        let mut carry = 0;
        for digit in digits.iter_mut().rev() {
            let double = 2 * *digit + carry;
            (*digit, carry) = (double % 10, double / 10);
        }
        bits = bits << 1 | u64::from(carry);
    }
    digits.iter().all(|&digit| digit == 0).then_some(bits)
}

fn split(text: &str) -> Option<Parts<'_>> {
    let (radix, body) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => (16, hex),
        None => (10, text),
    };
    let (whole, mut rest) = digits(body, radix)?;
    let mut fraction = "";
    if let Some(after) = rest.strip_prefix('.').filter(|_| radix == 10) {
        (fraction, rest) = digits(after, 10)?;
        if fraction.contains('_') {
            return None;
        }
    }
    let unit = rest.trim_start_matches(space).to_ascii_uppercase();
    let shift = match unit.strip_suffix("IB").or_else(|| unit.strip_suffix('B')).unwrap_or(&unit) {
        "" if unit != "IB" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => return None,
    };
    Some(Parts { radix, whole, fraction, shift })
}

/// The digits that a text begins with, underscores between them included, and the rest.
fn digits(text: &str, radix: u32) -> Option<(&str, &str)> {
    let end = text.find(|c: char| c != '_' && !c.is_digit(radix)).unwrap_or(text.len());
    let (digits, rest) = text.split_at(end);
    digits.split('_').all(|part| !part.is_empty()).then_some((digits, rest))
}

fn space(c: char) -> bool {
    c.is_ascii_whitespace()
}

/// A number of bytes as people read it, in the largest unit that is not above it, with one decimal, rounded half up:
/// `1.0 GiB`, `1.9 TiB`; bytes alone have none: `100 B`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nbytes = u128::from(self.0);
        let mut power = (self.0.max(1).ilog2() / 10) as usize;
        if power == 0 {
            return write!(f, "{nbytes} {}", UNITS[0]);
        }
        let tenths = |power: usize| (nbytes * 10 + (1 << (10 * power) >> 1)) >> (10 * power);
        // What rounds to 1024.0 KiB is 1.0 MiB.
        power += usize::from(tenths(power) >= 10240);
        let tenths = tenths(power);
        write!(f, "{}.{} {}", tenths / 10, tenths % 10, UNITS[power])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lines of the table that begin with `kind`: text and result.
    fn cases(kind: &str) -> Vec<(String, &'static str)> {
        let plain = |text: &str| text.replace("\\t", "\t").replace("\\n", "\n");
        let lines = include_str!("sizes_cases.txt").lines().filter(|line| !line.starts_with('#'));
        let fields = lines.map(|line| line.split('|').collect::<Vec<_>>());
        fields.filter(|fields| fields[0] == kind).map(|fields| (plain(fields[1]), fields[2])).collect()
    }

    #[test]
    fn the_table_is_read_as_it_says() {
        let cases = cases("read");
        assert!(cases.len() > 60);
        for (text, expected) in cases {
            let found = match parse_size(&text) {
                Ok(bytes) => bytes.to_string(),
                Err(error) => format!("{:?}", error.rule).to_lowercase(),
            };
            assert_eq!(found, expected, "{text:?}");
        }
    }

    #[test]
    fn the_table_is_printed_as_it_says() {
        let cases = cases("print");
        assert!(cases.len() > 15);
        for (bytes, expected) in cases {
            assert_eq!(Bytes(bytes.parse().unwrap()).to_string(), expected);
        }
    }

    #[test]
    fn a_refusal_names_the_text_the_rule_and_an_example() {
        assert_eq!(
            parse_size("1.0001K").unwrap_err().to_string(),
            "\"1.0001K\" is not a whole number of bytes (write 4096, 0x1000, 64K or 1.5G)"
        );
        assert!(parse_size(&"9".repeat(1 << 20)).unwrap_err().to_string().len() < 200);
        assert!(parse_size(&"\u{e0}".repeat(1 << 20)).unwrap_err().to_string().len() < 200);
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text in ".{0,20}|[-0-9a-fxKMGTPEiB._ ]{0,20}") {
            let _ = parse_size(&text);
        }

        #[test]
        fn numbers_are_read_back(n in any::<u64>()) {
            for text in [n.to_string(), format!("{n:#x}"), format!("0X{n:X}"), format!(" {n} B\n")] {
                prop_assert_eq!(parse_size(&text), Ok(n));
            }
        }

        #[test]
        fn exact_sizes_are_read_back_as_printed(n in 1..1024u64, shift in 0..6u32) {
            let bytes = n << (10 * shift);
            prop_assert_eq!(parse_size(&Bytes(bytes).to_string()), Ok(bytes));
        }

        #[test]
        fn binary_fractions_are_exact(n in 0..1u64 << 53, shift in 0..6u32) {
            // An f64 is exact for 53 bits, wherever the point is, and 60 digits after the point print it exactly.
            let text = format!("{:.60}{}", n as f64 / (1u64 << (10 * shift)) as f64, ["", "K", "M", "G", "T", "P"][shift as usize]);
            prop_assert_eq!(parse_size(&text), Ok(n), "{}", text);
        }
    }
}
