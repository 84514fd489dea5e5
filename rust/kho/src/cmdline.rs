//! The kernel's command line: `kho=` and `kho_scratch=`, parsed as the kernel parses them.
//!
//! The rules are those of `parse_args` (kernel/params.c), `next_arg` and `memparse` (lib/cmdline.c), `kstrtobool` and
//! `kstrtouint` (lib/kstrtox.c) and the two early parameters of kernel/kexec_handover.c; ABI.md section 5 sums them
//! up. The kernel works on bytes, and so does this: one oddity of that is that byte 0xa0, inside many UTF-8
//! characters, counts as a space. COMMAND_LINE_SIZE is not applied: what is given is what is parsed.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::units::PageSize;

/// Whether the kernel has KHO on after this command line (`kho=`, an early parameter read with `kstrtobool`).
///
/// `default` is CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT. The last well-formed occurrence wins; a malformed one, or `kho`
/// without a value, changes nothing.
pub fn kho_is_enabled(cmdline: &str, default: bool) -> bool {
    args(cmdline)
        .filter(|arg| arg.is("kho"))
        .filter_map(|arg| kstrtobool(&cmdline.as_bytes()[arg.value?]))
        .last()
        .unwrap_or(default)
}

/// The value of the last `kho_scratch=` on a command line, without its quotes; well-formed or not.
pub fn kho_scratch_of(cmdline: &str) -> Option<&str> {
    scratch_values(cmdline).last()
}

fn scratch_values(cmdline: &str) -> impl Iterator<Item = &str> {
    args(cmdline).filter(|arg| arg.is("kho_scratch")).filter_map(|arg| {
        let value = arg.value?;
        // It starts after '=' or '"', but a byte 0xa0 may have ended it inside a character: show all of that one.
        let end = (value.end..=cmdline.len()).find(|&end| cmdline.is_char_boundary(end))?;
        cmdline.get(value.start..end)
    })
}

/// Whether something may follow the third size of `kho_scratch=`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Trailing {
    /// As current kernels: the value ends there.
    #[default]
    Reject,
    /// As older kernels: the rest was not looked at.
    Ignore,
}

/// Which sizes of `LOW,GLOBAL,PERNODE` a kernel rounds up to the alignment; a percentage of memory always is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Rounding {
    /// All, as current kernels (upstream 0e39380a7316; from 6.18.42, 7.1.5 and 7.2 on).
    #[default]
    All,
    /// The size per node alone, as older kernels: of the last pageblock of the other areas, they take what lies next to
    /// the area as well.
    PerNode,
}

/// Which sizes of `LOW,GLOBAL,PERNODE` may be 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Zeros {
    /// Any but all three, as current kernels.
    #[default]
    NotAll,
    /// None, as the kernels before 6.18.
    None,
}

/// How large the scratch areas are to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ScratchSpec {
    /// Per cent of the memory the kernel reserved while booting. 0 is accepted, and asks for nothing.
    Percent(u32),
    /// Bytes, before rounding: in low memory, anywhere, and on each NUMA node.
    Sizes {
        /// In low memory, below 4 GiB.
        low: u64,
        /// Anywhere.
        global: u64,
        /// On each NUMA node.
        pernode: u64,
    },
}

impl Default for ScratchSpec {
    /// 200 %, as a kernel without `kho_scratch=`.
    fn default() -> Self {
        ScratchSpec::Percent(200)
    }
}

impl ScratchSpec {
    /// What a kernel booted with this command line uses: its last well-formed `kho_scratch=`, else the default.
    pub fn from_cmdline(cmdline: &str, trailing: Trailing) -> Self {
        let parsed = |value| parse_kho_scratch(value, trailing, Zeros::NotAll).ok();
        scratch_values(cmdline).filter_map(parsed).last().unwrap_or_default()
    }

    /// The sizes of the scratch areas in bytes, in the kernel's order: low memory, global, one per node.
    ///
    /// `reserved_low` and `reserved_all` are what the kernel reserved while booting below 4 GiB and everywhere,
    /// `reserved_per_node` the same on each node with memory; only a percentage looks at them. What `rounding` names is
    /// rounded up to `align`, see [`cma_alignment`]; the global area is what the percentage of everything exceeds the (rounded) low
    /// area by, and can be 0 (`scratch_size_update`, `scratch_size_node`).
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `align` is a power of two; [`Error::OutOfRange`] when a size exceeds 64 bits, where the
    /// kernel would go on with a wrapped number.
    pub fn sizes(
        &self,
        reserved_low: u64,
        reserved_all: u64,
        reserved_per_node: &[u64],
        align: u64,
        rounding: Rounding,
    ) -> Result<Vec<u64>> {
        if !align.is_power_of_two() {
            return Err(Error::Invalid { what: "scratch alignment", why: format!("{align:#x} is not a power of two") });
        }
        let up = |size: u128| -> Result<u64> {
            let rounded = size.next_multiple_of(u128::from(align));
            u64::try_from(rounded).map_err(|_| Error::OutOfRange {
                what: "scratch size",
                value: u64::try_from(size).unwrap_or(u64::MAX),
                limit: u64::MAX,
            })
        };
        let mut sizes = Vec::with_capacity(reserved_per_node.len().saturating_add(2));
        match *self {
            ScratchSpec::Percent(scale) => {
                let scaled = |reserved: u64| u128::from(reserved) * u128::from(scale) / 100;
                let low = up(scaled(reserved_low))?;
                sizes.push(low);
                sizes.push(up(scaled(reserved_all).saturating_sub(u128::from(low)))?);
                for &reserved in reserved_per_node {
                    sizes.push(up(scaled(reserved))?);
                }
            }
            ScratchSpec::Sizes { low, global, pernode } => {
                let up_or_not = |size: u64| match rounding {
                    Rounding::All => up(u128::from(size)),
                    Rounding::PerNode => Ok(size),
                };
                sizes.push(up_or_not(low)?);
                sizes.push(up_or_not(global)?);
                sizes.resize(sizes.capacity(), up(u128::from(pernode))?);
            }
        }
        Ok(sizes)
    }
}

/// CMA_MIN_ALIGNMENT_BYTES, one pageblock, which scratch areas start at and are multiples of: 2 MiB at 4 KiB pages,
/// 32 MiB at 16 KiB, 512 MiB at 64 KiB (the size a PMD maps, include/linux/pageblock-flags.h). Trees after 7.1 use
/// [`max_order_alignment`] instead.
pub const fn cma_alignment(page: PageSize) -> u64 {
    // A PMD maps one page full of 8-byte entries.
    page.bytes() << (page.shift() - 3)
}

/// The largest block of the page allocator under the default MAX_PAGE_ORDER: 4 MiB at 4 KiB pages (order 10), the
/// same as [`cma_alignment`] at 16 KiB (order 11) and 64 KiB (order 13).
pub const fn max_order_alignment(page: PageSize) -> u64 {
    match page {
        PageSize::Size4K => page.bytes() << 10,
        PageSize::Size16K | PageSize::Size64K => cma_alignment(page),
    }
}

/// Reads a value of `kho_scratch=`: `N%` or `LOW,GLOBAL,PERNODE` (`kho_parse_scratch_size`).
///
/// N is decimal, at most ten characters, below 2^32. The sizes are read by `memparse`: decimal, 0x or octal 0, and one
/// suffix K M G T P E in either case. A size beyond 64 bits wraps, as it does in the kernel, so that what comes out is
/// what the kernel would use; a suffix alone is 0 there, and is here. Which sizes may be 0 depends on the kernel: `zeros`.
///
/// # Errors
/// [`Error::Invalid`] for what the kernel calls malformed, saying what is missing.
pub fn parse_kho_scratch(value: &str, trailing: Trailing, zeros: Zeros) -> Result<ScratchSpec> {
    let invalid = |why: String| Error::Invalid { what: "kho_scratch", why };
    if value.is_empty() {
        return Err(invalid("empty: give N% or three sizes LOW,GLOBAL,PERNODE".into()));
    }
    if let Some(number) = value.strip_suffix('%') {
        return percent(number).map(ScratchSpec::Percent).map_err(invalid);
    }
    let mut rest = value.as_bytes();
    let mut sizes = [0u64; 3];
    for (given, size) in sizes.iter_mut().enumerate() {
        if given > 0 {
            rest = match rest.split_first() {
                Some((b',', after)) => after,
                None => {
                    return Err(invalid(format!("needs three sizes LOW,GLOBAL,PERNODE; only {given} given")));
                }
                Some(_) => {
                    return Err(invalid(format!(
                        "{:?} stands where a comma was expected, after size {given} of LOW,GLOBAL,PERNODE",
                        shown(rest)
                    )));
                }
            };
        }
        let (number, after) = memparse(rest);
        if after.len() == rest.len() {
            return Err(invalid(if rest.is_empty() {
                format!("needs three sizes LOW,GLOBAL,PERNODE; size {} is empty", given + 1)
            } else {
                format!("{:?} is not a size (digits, then K, M, G, T, P or E), and no percentage either", shown(rest))
            }));
        }
        (*size, rest) = (number, after);
    }
    if trailing == Trailing::Reject && !rest.is_empty() {
        return Err(invalid(format!(
            "{:?} follows the third size, where nothing may (older kernels ignored it)",
            shown(rest)
        )));
    }
    let [low, global, pernode] = sizes;
    if zeros == Zeros::None
        && let Some(n) = sizes.iter().position(|size| *size == 0)
    {
        let name = ["LOW", "GLOBAL", "PERNODE"][n];
        return Err(invalid(format!("{name} is 0 bytes, and the kernels before 6.18 take no size of 0")));
    }
    if low.wrapping_add(global).wrapping_add(pernode) == 0 {
        return Err(invalid("all three sizes together are 0 bytes".into()));
    }
    Ok(ScratchSpec::Sizes { low, global, pernode })
}

/// `kstrtouint(number, 10)` on at most ten characters: a plus sign before and a newline after it are accepted.
fn percent(number: &str) -> Result<u32, String> {
    const MAX_CHARS: usize = 10;
    if number.len() > MAX_CHARS {
        return Err(format!("a percentage has at most {MAX_CHARS} digits, not {}", number.len()));
    }
    let digits = number.strip_prefix('+').unwrap_or(number);
    let digits = digits.strip_suffix('\n').unwrap_or(digits);
    if digits.is_empty() || !digits.bytes().all(|c| c.is_ascii_digit()) {
        return Err(format!("{number:?} is not a number before %: decimal digits only"));
    }
    digits.parse().map_err(|_| format!("{digits} % exceeds {} %", u32::MAX))
}

/// `memparse`: a number and what follows it. Wraps at 64 bits.
fn memparse(text: &[u8]) -> (u64, &[u8]) {
    let hex = matches!(text, [b'0', b'x' | b'X', digit, ..] if digit.is_ascii_hexdigit());
    let (base, digits) = match text {
        _ if hex => (16, &text[2..]),
        [b'0', ..] => (8, text),
        _ => (10, text),
    };
    let value_of = |c: u8| char::from(c).to_digit(base).map(u64::from);
    let mut number = 0u64;
    let mut rest = digits;
    while let Some((&c, after)) = rest.split_first() {
        let Some(value) = value_of(c) else { break };
        number = number.wrapping_mul(u64::from(base)).wrapping_add(value);
        rest = after;
    }
    let shift = match rest.first().map(u8::to_ascii_uppercase) {
        Some(b'K') => 10,
        Some(b'M') => 20,
        Some(b'G') => 30,
        Some(b'T') => 40,
        Some(b'P') => 50,
        Some(b'E') => 60,
        _ => return (number, rest),
    };
    (number << shift, &rest[1..])
}

/// `kstrtobool`: the first letter decides, the second one of "on" and "off". The words of enable and disable came in
/// 6.16, as did KHO.
fn kstrtobool(text: &[u8]) -> Option<bool> {
    let letter = |i: usize| text.get(i).map(u8::to_ascii_lowercase);
    match letter(0)? {
        b'e' | b'y' | b't' | b'1' => Some(true),
        b'd' | b'n' | b'f' | b'0' => Some(false),
        b'o' => match letter(1)? {
            b'n' => Some(true),
            b'f' => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// The first few characters, for a message.
fn shown(bytes: &[u8]) -> String {
    const SHOWN: usize = 24;
    let text = String::from_utf8_lossy(bytes);
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into_owned(),
    }
}

/// One parameter: its name, and where its value stands in the command line.
struct Arg<'a> {
    name: &'a [u8],
    value: Option<core::ops::Range<usize>>,
}

impl Arg<'_> {
    /// `parameq`: dashes and underscores are the same.
    fn is(&self, name: &str) -> bool {
        let dashed = |c: &u8| if *c == b'-' { b'_' } else { *c };
        self.name.iter().map(dashed).eq(name.bytes())
    }
}

/// The parameters up to a lone `--` or a NUL (`parse_args`, `next_arg`): separated by spaces outside double quotes;
/// quotes may enclose the value or the whole parameter, and are not part of it.
fn args(cmdline: &str) -> impl Iterator<Item = Arg<'_>> {
    let line = cmdline.as_bytes();
    let line = &line[..line.iter().position(|&c| c == 0).unwrap_or(line.len())];
    let mut at = 0;
    core::iter::from_fn(move || {
        at += line[at..].iter().take_while(|&&c| is_space(c)).count();
        let quoted = *line.get(at)? == b'"';
        let start = at + usize::from(quoted);
        let (mut in_quote, mut equals, mut end) = (quoted, None, start);
        while let Some(&c) = line.get(end) {
            match c {
                _ if is_space(c) && !in_quote => break,
                b'"' => in_quote = !in_quote,
                // A name is not empty: an '=' in front belongs to it.
                b'=' if equals.is_none() && end > start => equals = Some(end),
                _ => {}
            }
            end += 1;
        }
        at = end;
        let ends_in_quote = end > start && line[end - 1] == b'"';
        Some(match equals {
            None => Arg { name: &line[start..end - usize::from(quoted && ends_in_quote)], value: None },
            Some(equals) => {
                let value_quoted = line.get(equals + 1) == Some(&b'"') && equals + 1 < end;
                let first = equals + 1 + usize::from(value_quoted);
                let last = end - usize::from((quoted || value_quoted) && ends_in_quote);
                Arg { name: &line[start..equals], value: Some(first..last.max(first)) }
            }
        })
    })
    .take_while(|arg| arg.value.is_some() || arg.name != b"--")
}

/// The kernel's `isspace`: its table is Latin-1, where 0xa0 is a no-break space.
const fn is_space(c: u8) -> bool {
    matches!(c, b'\t'..=b'\r' | b' ' | 0xa0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn scratch(value: &str) -> ScratchSpec {
        parse_kho_scratch(value, Trailing::Reject, Zeros::NotAll).unwrap()
    }

    fn refusal(value: &str) -> String {
        parse_kho_scratch(value, Trailing::Reject, Zeros::NotAll).unwrap_err().to_string()
    }

    const fn sizes(low: u64, global: u64, pernode: u64) -> ScratchSpec {
        ScratchSpec::Sizes { low, global, pernode }
    }

    #[test]
    fn kho_is_read_as_kstrtobool_reads_it() {
        for on in ["kho=on", "kho=1", "kho=y", "kho=Yes", "kho=TRUE", "kho=oN", "kho=enabled", "kho=onwards"] {
            assert!(kho_is_enabled(on, false), "{on}");
        }
        for off in ["kho=off", "kho=0", "kho=n", "kho=No", "kho=false", "kho=oF", "kho=Disabled"] {
            assert!(!kho_is_enabled(off, true), "{off}");
        }
    }

    #[test]
    fn a_malformed_kho_leaves_the_state_as_it_was() {
        for nothing in [
            "", " ", "kho", "kho=", "kho=o", "kho=2", "kho=ja", "kho= on", "kho =on", "KHO=on", "khoo=on", "x.kho=on",
            "=kho=on", "kho=\"", "\"", "kho=\"\"", "kho=ön",
        ] {
            assert!(!kho_is_enabled(nothing, false), "{nothing}");
            assert!(kho_is_enabled(nothing, true), "{nothing}");
        }
    }

    #[test]
    fn the_last_valid_kho_wins() {
        let real = "console=ttyS0 kho=on liveupdate=on nokaslr panic=-1 kho=off cap_hostonly";
        assert!(!kho_is_enabled(real, false));
        assert!(kho_is_enabled("kho=off kho=on", false));
        assert!(kho_is_enabled("kho=on kho=maybe kho", false));
    }

    #[test]
    fn nothing_behind_a_lone_double_dash_is_the_kernels() {
        assert!(!kho_is_enabled("quiet -- kho=on", false));
        assert!(!kho_is_enabled("quiet \"--\" kho=on", false));
        assert!(kho_is_enabled("quiet --x kho=on", false));
        assert!(kho_is_enabled("-- kho=off", true));
        assert!(kho_is_enabled("--=1 kho=on", false));
    }

    #[test]
    fn quotes_and_spaces_are_those_of_next_arg() {
        for on in [
            "kho=\"on\"",
            "\"kho=on\"",
            "a=\"b kho=off\" kho=on",
            "\tkho=on\n",
            "kho=\"on",
            "\"x y\" kho=on",
            "a=\"\" kho=on",
            "x=\u{a0}kho=on",
            "x=\u{e0}kho=on",
        ] {
            assert!(kho_is_enabled(on, false), "{on}");
        }
        assert!(!kho_is_enabled("a=\"b kho=on\"", false));
        assert!(!kho_is_enabled("a=b\" kho=on", false));
        assert!(!kho_is_enabled("quiet\0 kho=on", false));
    }

    #[test]
    fn dashes_and_underscores_are_equal_in_names() {
        assert_eq!(kho_scratch_of("kho-scratch=10%"), Some("10%"));
        assert_eq!(kho_scratch_of("kho_scratch=1%  kho-scratch=\"2 %\" x"), Some("2 %"));
        assert_eq!(kho_scratch_of("kho_scratch"), None);
        assert_eq!(kho_scratch_of("kho_scratch= -- kho_scratch=1%"), Some(""));
        assert_eq!(kho_scratch_of("kho_scratch=1M,1M,1M\u{e0}kho=1"), Some("1M,1M,1M\u{e0}"));
    }

    #[test]
    fn the_command_lines_scratch_is_the_last_that_parses() {
        let spec = |line| ScratchSpec::from_cmdline(line, Trailing::Reject);
        assert_eq!(spec("quiet"), ScratchSpec::Percent(200));
        assert_eq!(spec("kho_scratch=16M,32M,16M"), sizes(16 << 20, 32 << 20, 16 << 20));
        assert_eq!(spec("kho_scratch=50% kho_scratch=1M"), ScratchSpec::Percent(50));
        assert_eq!(ScratchSpec::from_cmdline("kho_scratch=1K,0,0x", Trailing::Ignore), sizes(1024, 0, 0));
    }

    #[test]
    fn percentages_are_those_of_kstrtouint() {
        assert_eq!(scratch("200%"), ScratchSpec::Percent(200));
        assert_eq!(scratch("0%"), ScratchSpec::Percent(0));
        assert_eq!(scratch("+7%"), ScratchSpec::Percent(7));
        assert_eq!(scratch("7\n%"), ScratchSpec::Percent(7));
        assert_eq!(scratch("4294967295%"), ScratchSpec::Percent(u32::MAX));
        assert_eq!(scratch("0000000010%"), ScratchSpec::Percent(10));
        assert_eq!(refusal("4294967296%"), "kho_scratch: 4294967296 % exceeds 4294967295 %");
        assert_eq!(refusal("00000000010%"), "kho_scratch: a percentage has at most 10 digits, not 11");
        for bad in ["%", "+%", "-1%", "++1%", "1.5%", "0x10%", " 5%", "5 %", "5%%", "١%", "1M,1M,1M%"] {
            assert!(parse_kho_scratch(bad, Trailing::Ignore, Zeros::NotAll).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_those_of_memparse() {
        assert_eq!(scratch("64M,3G,64M"), sizes(64 << 20, 3 << 30, 64 << 20));
        assert_eq!(scratch("1k,1t,1p"), sizes(1 << 10, 1 << 40, 1 << 50));
        assert_eq!(scratch("0x10,010,0X1fK"), sizes(16, 8, 31 << 10));
        assert_eq!(scratch("0,0,1e"), sizes(0, 0, 1 << 60));
        assert_eq!(scratch("0x1E,0,0"), sizes(0x1e, 0, 0));
        assert_eq!(scratch("M,1,0"), sizes(0, 1, 0));
        assert_eq!(scratch("17E,1,0"), sizes(1 << 60, 1, 0));
        assert_eq!(scratch("18446744073709551617,0,0"), sizes(1, 0, 0));
    }

    #[test]
    fn a_refused_size_says_what_is_missing() {
        assert_eq!(refusal("64M,64M"), "kho_scratch: needs three sizes LOW,GLOBAL,PERNODE; only 2 given");
        assert_eq!(refusal("64M,64M,"), "kho_scratch: needs three sizes LOW,GLOBAL,PERNODE; size 3 is empty");
        assert_eq!(
            refusal("64Mi,64M,64M"),
            "kho_scratch: \"i,64M,64M\" stands where a comma was expected, after size 1 of LOW,GLOBAL,PERNODE"
        );
        assert_eq!(
            refusal("ü"),
            "kho_scratch: \"ü\" is not a size (digits, then K, M, G, T, P or E), and no percentage either"
        );
        assert_eq!(refusal("0,0x0,0K"), "kho_scratch: all three sizes together are 0 bytes");
        assert_eq!(refusal("8E,8E,0"), "kho_scratch: all three sizes together are 0 bytes");
        assert_eq!(
            refusal("1M,1M,1M,1M"),
            "kho_scratch: \",1M\" follows the third size, where nothing may (older kernels ignored it)"
        );
        for bad in ["", "-1M,1M,1M", " 1M,1M,1M", "1M, 1M,1M", "08,1,1", "1MM,1,1", "0x,1,1", "1M;1M;1M"] {
            assert!(parse_kho_scratch(bad, Trailing::Ignore, Zeros::NotAll).is_err(), "{bad}");
        }
    }

    #[test]
    fn older_kernels_ignore_what_follows() {
        assert_eq!(parse_kho_scratch("1,2,3 and more", Trailing::Ignore, Zeros::NotAll).unwrap(), sizes(1, 2, 3));
        assert!(parse_kho_scratch("1,2", Trailing::Ignore, Zeros::NotAll).is_err());
    }

    #[test]
    fn very_long_values_are_neither_slow_nor_echoed() {
        let long = "9".repeat(1 << 20);
        assert!(refusal(&long).len() < 200);
        assert!(refusal(&format!("1,1,1{}", "x".repeat(1 << 20))).len() < 200);
        assert!(refusal(&format!("{long}%")).len() < 200);
        let line = format!("{} kho=on", "a=\"b c\" ".repeat(1 << 17));
        assert!(kho_is_enabled(&line, false));
    }

    #[test]
    fn sizes_round_up_as_scratch_size_update_does() {
        const MIB: u64 = 1 << 20;
        let align = cma_alignment(PageSize::Size4K);
        let percent = ScratchSpec::Percent(200);
        assert_eq!(
            percent.sizes(10 * MIB + 1, 100 * MIB, &[60 * MIB, 40 * MIB], align, Rounding::All).unwrap(),
            [22 * MIB, 178 * MIB, 120 * MIB, 80 * MIB]
        );
        // All of it is low: rounding the low area leaves less than nothing for the global one.
        assert_eq!(percent.sizes(3, 3, &[3], align, Rounding::All).unwrap(), [2 * MIB, 0, 2 * MIB]);
        assert_eq!(ScratchSpec::Percent(0).sizes(1, 1, &[1], align, Rounding::All).unwrap(), [0, 0, 0]);
        assert_eq!(
            sizes(1, 0, 33 * MIB).sizes(0, 0, &[7, 8, 9], 32 * MIB, Rounding::All).unwrap(),
            [32 * MIB, 0, 64 * MIB, 64 * MIB, 64 * MIB]
        );
    }

    #[test]
    fn sizes_of_the_64k_capture_are_one_pageblock_each() {
        let asked = scratch("16M,32M,16M").sizes(0, 0, &[0], cma_alignment(PageSize::Size64K), Rounding::All);
        assert_eq!(asked.unwrap(), [536_870_912; 3]);
    }

    #[test]
    fn sizes_beyond_64_bits_are_refused() {
        assert!(sizes(u64::MAX, 0, 0).sizes(0, 0, &[], 4096, Rounding::All).is_err());
        assert!(ScratchSpec::Percent(u32::MAX).sizes(u64::MAX, 0, &[], 4096, Rounding::All).is_err());
        assert_eq!(
            sizes(1, 1, 1).sizes(0, 0, &[], 3, Rounding::All).unwrap_err().to_string(),
            "scratch alignment: 0x3 is not a power of two"
        );
        assert!(sizes(1, 1, 1).sizes(0, 0, &[], 0, Rounding::All).is_err());
    }

    #[test]
    fn older_kernels_round_the_size_per_node_alone_and_percentages_always() {
        let given = sizes(3 << 20, 5 << 20, 7 << 20);
        let of = |rounding| given.sizes(0, 0, &[0], 4 << 20, rounding).unwrap();
        assert_eq!(of(Rounding::PerNode), [3 << 20, 5 << 20, 8 << 20]);
        assert_eq!(of(Rounding::All), [4 << 20, 8 << 20, 8 << 20]);
        let percent = ScratchSpec::Percent(100);
        let of = |rounding| percent.sizes(1, 9 << 20, &[1], 4 << 20, rounding).unwrap();
        assert_eq!(of(Rounding::PerNode), of(Rounding::All));
    }

    #[test]
    fn kernels_before_6_18_take_no_size_of_0() {
        for (value, name) in [("0,1M,1M", "LOW"), ("1M,0,1M", "GLOBAL"), ("1M,1M,0", "PERNODE")] {
            assert!(parse_kho_scratch(value, Trailing::Ignore, Zeros::NotAll).is_ok(), "{value}");
            let refused = parse_kho_scratch(value, Trailing::Ignore, Zeros::None).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("kho_scratch: {name} is 0 bytes")), "{refused}");
        }
        assert!(parse_kho_scratch("1M,1M,1M rest", Trailing::Ignore, Zeros::None).is_ok());
    }

    #[test]
    fn alignments_are_a_pageblock() {
        assert_eq!(PageSize::ALL.map(cma_alignment), [2 << 20, 32 << 20, 512 << 20]);
        assert_eq!(PageSize::ALL.map(max_order_alignment), [4 << 20, 32 << 20, 512 << 20]);
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_without_panic(line in ".{0,200}", value in "[0-9a-zA-Z,%+ \\u{a0}\\u{e0}\"=-]{0,40}") {
            let joined = format!("{line} kho_scratch={value} kho={value}");
            for text in [&line, &value, &joined] {
                let _ = kho_is_enabled(text, true);
                let _ = kho_scratch_of(text);
                let _ = ScratchSpec::from_cmdline(text, Trailing::Ignore);
                let strict = parse_kho_scratch(text, Trailing::Reject, Zeros::NotAll);
                if let Ok(strict) = strict {
                    prop_assert_eq!(parse_kho_scratch(text, Trailing::Ignore, Zeros::NotAll).unwrap(), strict);
                }
            }
        }

        #[test]
        fn the_default_decides_only_when_no_parameter_does(line in "(kho=(on|off|x|)? ?|a=\"| |--|\\u{e0}){0,8}") {
            let (with, without) = (kho_is_enabled(&line, true), kho_is_enabled(&line, false));
            prop_assert!(with || !without);
        }

        #[test]
        fn written_sizes_are_read_back(low in any::<u64>(), global in any::<u64>(), pernode in any::<u64>()) {
            prop_assume!(low.wrapping_add(global).wrapping_add(pernode) != 0);
            let expected = sizes(low, global, pernode);
            prop_assert_eq!(scratch(&format!("{low},{global},{pernode}")), expected);
            prop_assert_eq!(scratch(&format!("{low:#x},{global:#X},0{pernode:o}").replace("0X", "0x")), expected);
        }
    }
}
