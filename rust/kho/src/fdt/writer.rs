//! The writer: byte for byte what libfdt's sequential writer (fdt_sw.c) makes of the same calls.
//!
//! libfdt fills one buffer from both ends and closes the gap in `fdt_finish`:
//!
//! ```text
//! header | reservation map | structure ->   ...   <- strings, newest lowest |
//! ```

#![forbid(unsafe_code)]

use super::{BEGIN_NODE, END, END_NODE, HEADER_V17, MAGIC, MAX_DEPTH, PROP, align4, printable, problem};
use crate::error::{FdtProblem, Result};

/// Where the reservation map starts: the header, rounded up to an entry's 16 bytes.
const MAP_START: usize = 48;
const MAP_ENTRY: usize = 16;
const VERSION: u32 = 17;
const LAST_COMPATIBLE: u32 = 16;
/// libfdt takes the size of its buffer as an int.
const MAX_CAPACITY: usize = i32::MAX as usize;

/// Writes a devicetree from front to back, in a buffer of fixed capacity.
///
/// Calls that fail change nothing. The reservation map ends where the root node begins. Properties go before subnodes,
/// since readers stop there; a name given twice is written twice, and readers take the first.
#[derive(Debug, Clone)]
pub struct FdtWriter {
    capacity: usize,
    reservations: Vec<(u64, u64)>,
    structure: Vec<u8>,
    /// Names in the order they were added; each with where it starts, counted down from the end of the strings.
    strings: Vec<(String, usize)>,
    strings_len: usize,
    /// Where in `structure` a name offset stands, and its distance from the end of the strings.
    name_offsets: Vec<(usize, usize)>,
    /// Where in `structure` the value of a placeholder stands, and its name.
    placeholders: Vec<(std::ops::Range<usize>, String)>,
    /// One for each open node: whether it has a subnode.
    open: Vec<bool>,
}

/// A property whose value is given later, with [`FdtWriter::fill`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placeholder(usize);

impl FdtWriter {
    /// An empty tree for a buffer of `capacity` bytes (fdt_create). A handover's is a page.
    pub fn new(capacity: usize) -> Self {
        FdtWriter {
            capacity: capacity.min(MAX_CAPACITY),
            reservations: Vec::new(),
            structure: Vec::new(),
            strings: Vec::new(),
            strings_len: 0,
            name_offsets: Vec::new(),
            placeholders: Vec::new(),
            open: Vec::new(),
        }
    }

    /// How many nodes are open.
    pub fn depth(&self) -> usize {
        self.open.len()
    }

    /// Adds an entry to the memory reservation map (fdt_add_reservemap_entry).
    ///
    /// # Errors
    /// `BadState` once the root node has begun, or for 0, 0, which ends the map; `NoSpace`.
    pub fn add_reservemap_entry(&mut self, address: u64, size: u64) -> Result<()> {
        if !self.structure.is_empty() {
            return self.bad_state("a reservation after the root node began");
        }
        if (address, size) == (0, 0) {
            return self.bad_state("the reservation 0, 0 would end the map");
        }
        if self.structure_start() + MAP_ENTRY > self.capacity {
            return self.no_space();
        }
        self.reservations.push((address, size));
        Ok(())
    }

    /// Begins a node: the root with the empty name, then its descendants (fdt_begin_node).
    ///
    /// # Errors
    /// `BadName`; `BadState` for a second root; `TooDeep`; `NoSpace`.
    pub fn begin_node(&mut self, name: &str) -> Result<()> {
        if self.open.is_empty() {
            if !self.structure.is_empty() {
                return self.bad_state("a second root node");
            }
            if !name.is_empty() {
                return self.bad_state("the root node has no name");
            }
        } else if printable(name.as_bytes()).is_none() {
            return self.bad(FdtProblem::BadName);
        }
        if self.open.len() >= MAX_DEPTH as usize {
            return self.bad(FdtProblem::TooDeep { max: MAX_DEPTH });
        }
        self.reserve(4 + (name.len() + 1).next_multiple_of(4), 0)?;
        self.push_word(BEGIN_NODE);
        self.structure.extend_from_slice(name.as_bytes());
        self.structure.push(0);
        self.pad();
        if let Some(has_subnode) = self.open.last_mut() {
            *has_subnode = true;
        }
        self.open.push(false);
        Ok(())
    }

    /// Adds a property to the open node (fdt_property).
    ///
    /// # Errors
    /// `BadName`; `BadState` outside of a node or after a subnode; `NoSpace`.
    pub fn property(&mut self, name: &str, value: &[u8]) -> Result<()> {
        let at = self.begin_property(name, value.len())?;
        self.structure[at..at + value.len()].copy_from_slice(value);
        Ok(())
    }

    /// A property of 4 bytes, native-endian.
    ///
    /// # Errors
    /// As [`FdtWriter::property`].
    pub fn property_u32(&mut self, name: &str, value: u32) -> Result<()> {
        self.property(name, &value.to_le_bytes())
    }

    /// A property of 8 bytes, native-endian.
    ///
    /// # Errors
    /// As [`FdtWriter::property`].
    pub fn property_u64(&mut self, name: &str, value: u64) -> Result<()> {
        self.property(name, &value.to_le_bytes())
    }

    /// A string property, its NUL added (fdt_property_string).
    ///
    /// # Errors
    /// As [`FdtWriter::property`]; `BadString` if `text` holds a NUL.
    pub fn property_str(&mut self, name: &str, text: &str) -> Result<()> {
        if text.contains('\0') {
            let property = name.to_owned();
            return self.bad(FdtProblem::BadString { property });
        }
        let at = self.begin_property(name, text.len() + 1)?;
        self.structure[at..at + text.len()].copy_from_slice(text.as_bytes());
        Ok(())
    }

    /// A property of `len` bytes, zero until filled (fdt_property_placeholder).
    ///
    /// # Errors
    /// As [`FdtWriter::property`].
    pub fn placeholder(&mut self, name: &str, len: usize) -> Result<Placeholder> {
        let at = self.begin_property(name, len)?;
        self.placeholders.push((at..at + len, name.to_owned()));
        Ok(Placeholder(self.placeholders.len() - 1))
    }

    /// Gives a placeholder of this writer its value; again, if need be.
    ///
    /// # Errors
    /// `BadLength` unless `value` is as long as was reserved; `BadState` for another writer's placeholder.
    pub fn fill(&mut self, placeholder: Placeholder, value: &[u8]) -> Result<()> {
        let Some((place, name)) = self.placeholders.get(placeholder.0) else {
            return self.bad_state("a placeholder of another writer");
        };
        if place.len() != value.len() {
            return self.bad(FdtProblem::BadLength {
                property: name.clone(),
                need: place.len() as u64,
                have: value.len() as u64,
            });
        }
        self.structure[place.clone()].copy_from_slice(value);
        Ok(())
    }

    /// Ends the open node (fdt_end_node).
    ///
    /// # Errors
    /// `BadState` if none is open; `NoSpace`.
    pub fn end_node(&mut self) -> Result<()> {
        if self.open.is_empty() {
            return self.bad_state("end_node without a node");
        }
        self.reserve(4, 0)?;
        self.push_word(END_NODE);
        self.open.pop();
        Ok(())
    }

    /// The blob (fdt_finish).
    ///
    /// # Errors
    /// As [`FdtWriter::to_blob`].
    pub fn finish(self) -> Result<Vec<u8>> {
        self.to_blob()
    }

    /// The blob as [`FdtWriter::finish`] would give it now; placeholders may be filled again afterwards.
    ///
    /// # Errors
    /// `BadState` without a root node or while a node is open; `NoSpace` if just the END token does not fit.
    pub fn to_blob(&self) -> Result<Vec<u8>> {
        if self.structure.is_empty() {
            return self.bad_state("finish without a root node");
        }
        if !self.open.is_empty() {
            return self.bad_state("finish while a node is open");
        }
        self.reserve(4, 0)?;
        let start = self.structure_start();
        let structure_len = self.structure.len() + 4;
        let strings_start = start + structure_len;
        let total = strings_start + self.strings_len;

        let mut blob = Vec::with_capacity(total);
        for field in [
            MAGIC,
            word(total),
            word(start),
            word(strings_start),
            word(MAP_START),
            VERSION,
            LAST_COMPATIBLE,
            0,
            word(self.strings_len),
            word(structure_len),
        ] {
            blob.extend_from_slice(&field.to_be_bytes());
        }
        blob.resize(MAP_START, 0);
        for (address, size) in self.reservations.iter().chain([&(0, 0)]) {
            blob.extend_from_slice(&address.to_be_bytes());
            blob.extend_from_slice(&size.to_be_bytes());
        }
        blob.extend_from_slice(&self.structure);
        for &(at, from_end) in &self.name_offsets {
            let offset = word(self.strings_len - from_end);
            blob[start + at..start + at + 4].copy_from_slice(&offset.to_be_bytes());
        }
        blob.extend_from_slice(&END.to_be_bytes());
        for (name, _) in self.strings.iter().rev() {
            blob.extend_from_slice(name.as_bytes());
            blob.push(0);
        }
        Ok(blob)
    }

    fn structure_start(&self) -> usize {
        MAP_START + MAP_ENTRY * (self.reservations.len() + 1)
    }

    /// Where the structure block would go on in the blob, to say where an error is.
    fn at(&self) -> usize {
        self.structure_start() + self.structure.len()
    }

    fn bad<T>(&self, what: FdtProblem) -> Result<T> {
        Err(problem(self.at(), what))
    }

    fn bad_state<T>(&self, why: &'static str) -> Result<T> {
        self.bad(FdtProblem::BadState { why })
    }

    fn no_space<T>(&self) -> Result<T> {
        let capacity = self.capacity as u64;
        self.bad(FdtProblem::NoSpace { capacity })
    }

    /// Whether so much more fits (fdt_grab_space_, fdt_add_string_).
    fn reserve(&self, structure: usize, strings: usize) -> Result<()> {
        let used = self.at() + self.strings_len;
        let left = self.capacity.checked_sub(used);
        match structure.checked_add(strings) {
            Some(more) if left.is_some_and(|left| more <= left) => Ok(()),
            _ => self.no_space(),
        }
    }

    fn push_word(&mut self, value: u32) {
        self.structure.extend_from_slice(&value.to_be_bytes());
    }

    fn pad(&mut self) {
        let padded = self.structure.len().next_multiple_of(4);
        self.structure.resize(padded, 0);
    }

    /// How far from the end of the strings `name` can be read already: the lowest place, which is inside the newest
    /// name that ends with it (fdt_find_string_).
    fn find_string(&self, name: &str) -> Option<usize> {
        let newest_first = self.strings.iter().rev();
        newest_first
            .filter(|(known, _)| known.ends_with(name))
            .map(|(known, from_end)| from_end - (known.len() - name.len()))
            .next()
    }

    /// A property with a value of zeros; returns where in `structure` the value stands.
    fn begin_property(&mut self, name: &str, len: usize) -> Result<usize> {
        match self.open.last() {
            None => return self.bad_state("a property outside of any node"),
            Some(true) => return self.bad_state("a property after a subnode"),
            Some(false) => {}
        }
        if printable(name.as_bytes()).is_none() {
            return self.bad(FdtProblem::BadName);
        }
        let known = self.find_string(name);
        let more_strings = if known.is_some() { 0 } else { name.len() + 1 };
        let Some(padded) = align4(len).and_then(|padded| padded.checked_add(12)) else {
            return self.no_space();
        };
        self.reserve(padded, more_strings)?;

        let from_end = known.unwrap_or_else(|| {
            self.strings_len += more_strings;
            self.strings.push((name.to_owned(), self.strings_len));
            self.strings_len
        });
        self.push_word(PROP);
        self.push_word(word(len));
        self.name_offsets.push((self.structure.len(), from_end));
        self.push_word(0);
        let at = self.structure.len();
        self.structure.resize(at + len, 0);
        self.pad();
        Ok(at)
    }
}

/// Sizes and offsets stay below [`MAX_CAPACITY`].
fn word(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

const _: () = assert!(MAP_START == HEADER_V17.next_multiple_of(MAP_ENTRY));
