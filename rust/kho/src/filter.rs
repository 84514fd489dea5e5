//! Why memory of a machine is not in its dump, and the levels of makedumpfile's filter.

#![forbid(unsafe_code)]

/// Why memory that a file names is not in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Absent {
    /// The program that wrote the dump left it out: makedumpfile's levels, a range that QEMU was asked for.
    LeftOut,
    /// The file ends before what its headers promise.
    CutOff,
}

impl Absent {
    /// Both, in the order of their numbers.
    pub const ALL: [Absent; 2] = [Absent::LeftOut, Absent::CutOff];

    /// A word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Absent::LeftOut => "left out",
            Absent::CutOff => "cut off",
        }
    }
}

/// What a dump's level leaves out (makedumpfile's `-d`): "zero, cache, user, free pages".
pub fn level_names(level: u32) -> String {
    const CACHE: u32 = 2;
    const PRIVATE_CACHE: u32 = 4;
    let cache = match (level & CACHE != 0, level & PRIVATE_CACHE != 0) {
        (true, _) => Some("cache"),
        (false, true) => Some("private cache"),
        (false, false) => None,
    };
    let bit = |bit, name| (level & bit != 0).then_some(name);
    let names: Vec<_> = [bit(1, "zero"), cache, bit(8, "user"), bit(16, "free")].into_iter().flatten().collect();
    match names.is_empty() {
        true => "no pages".into(),
        false => format!("{} pages", names.join(", ")),
    }
}

/// How to get a dump that has the contents of a handover.
pub const REMEDY: &str = "makedumpfile -d 17 or -d 1 keeps it, and so does running kho in the kdump kernel, on \
                          /proc/vmcore before makedumpfile";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_named_by_their_bits() {
        for (level, names) in [
            (31, "zero, cache, user, free pages"),
            (17, "zero, free pages"),
            (1, "zero pages"),
            (4, "private cache pages"),
            (0, "no pages"),
        ] {
            assert_eq!(level_names(level), names);
        }
    }
}
