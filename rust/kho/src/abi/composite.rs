//! Compatible strings of the draft of June 2026 (abi.md section 9): a base and parts, `kho-v4;radix-v1;vmalloc-v1`.

#![forbid(unsafe_code)]

use super::PARTS;

const SEPARATOR: char = ';';
/// Doubts that are named one by one; a string of 64 KiB could give rise to thousands.
const MOST_DOUBTS: usize = 8;
/// Characters of a part that a doubt shows.
const MOST_SHOWN: usize = 48;

/// A compatible string, taken apart. One without parts is its own base.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Composite<'a> {
    /// What stands before the first `;`.
    pub base: &'a str,
    /// What stands after it, in that order.
    pub parts: Vec<&'a str>,
}

impl<'a> Composite<'a> {
    /// Takes a compatible string apart.
    pub fn of(compatible: &'a str) -> Self {
        let mut all = compatible.split(SEPARATOR);
        let base = all.next().unwrap_or_default();
        Composite { base, parts: all.collect() }
    }

    /// What each part is the format of; `None` if it is not known.
    pub fn known(part: &str) -> Option<&'static str> {
        PARTS.iter().find(|(name, _)| *name == part).map(|(_, what)| *what)
    }

    /// What speaks against reading each part as the version that is known of it: unknown parts by name, and an order that
    /// no writer of the draft makes (they are sorted, each once, and kernels compare the whole string).
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        for part in self.parts.iter().filter(|part| Self::known(part).is_none()) {
            let shown: String = part.chars().take(MOST_SHOWN).collect();
            let close = |(name, what): &&(&str, &str)| family(name) == family(part) && !what.is_empty();
            doubts.push(match PARTS.iter().find(close) {
                Some((name, what)) => format!("part {shown:?} is not known: {what} read as {name}"),
                None => format!("part {shown:?} is not known"),
            });
        }
        if !self.parts.is_sorted_by(|a, b| a < b) {
            doubts.push("its parts are not in alphabetical order, each once".into());
        }
        if doubts.len() > MOST_DOUBTS {
            let more = doubts.len() - MOST_DOUBTS;
            doubts.truncate(MOST_DOUBTS);
            doubts.push(format!("and {more} more"));
        }
        doubts
    }
}

/// A name without its version.
fn family(name: &str) -> &str {
    name.rsplit_once("-v").map_or(name, |(family, _)| family)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_string_without_parts_is_its_own_base() {
        for text in ["", "kho-v4", "anything at all"] {
            let composite = Composite::of(text);
            assert_eq!((composite.base, composite.parts.len()), (text, 0));
            assert!(composite.doubts().is_empty());
        }
    }

    #[test]
    fn each_part_is_judged() {
        let composite = Composite::of("kho-v4;radix-v1;vmalloc-v1");
        assert_eq!((composite.base, &*composite.parts), ("kho-v4", &["radix-v1", "vmalloc-v1"][..]));
        assert!(composite.doubts().is_empty());
        let doubts = Composite::of("x;hash-v1;radix-v2;vmalloc-v1").doubts();
        assert_eq!(
            doubts,
            [
                "part \"hash-v1\" is not known",
                "part \"radix-v2\" is not known: the radix tree of the map read as radix-v1"
            ]
        );
        assert_eq!(Composite::of("x;").doubts().len(), 1);
        for disorder in ["x;vmalloc-v1;radix-v1", "x;radix-v1;radix-v1"] {
            assert_eq!(Composite::of(disorder).doubts(), ["its parts are not in alphabetical order, each once"]);
        }
    }

    #[test]
    fn doubts_are_few_and_short_whatever_the_string() {
        let text = format!("kho-v4{}", format!(";{}", "p".repeat(1000)).repeat(1000));
        let doubts = Composite::of(&text).doubts();
        assert_eq!(doubts.len(), MOST_DOUBTS + 1);
        assert!(doubts.iter().all(|doubt| doubt.len() < 200));
        assert_eq!(doubts.last().map(String::as_str), Some("and 993 more"));
    }
}
