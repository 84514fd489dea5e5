//! The editor: byte for byte what libfdt's read-write functions (fdt_rw.c) make of the same calls.
//!
//! A tree is opened in a buffer larger than itself, edited in place, and packed:
//!
//! ```text
//! header | reservation map | structure -> | strings -> | free              (fdt_open_into)
//!                               \ subnodes go after the node's properties, before its other subnodes
//!                                 properties go before its other properties
//! ```
//! Strings are appended at the end of their block and never removed.

#![forbid(unsafe_code)]

use super::{BEGIN_NODE, END, END_NODE, Fdt, HEADER_V17, MAX_DEPTH, NOP, PROP, align4, printable, problem};
use crate::error::{Error, FdtProblem, Result};

/// Where a packed tree has its reservation map: the header, rounded up to 8 (fdt_packblocks_).
const PACKED_MAP_START: usize = HEADER_V17.next_multiple_of(8);
const MAP_ENTRY: usize = 16;

/// A devicetree that can be changed, in a buffer of fixed capacity. Calls that fail change nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FdtEditor {
    /// The header, then whatever stands before the structure: the reservation map.
    head: Vec<u8>,
    structure: Vec<u8>,
    strings: Vec<u8>,
    capacity: usize,
}

/// A node of an [`FdtEditor`]: where its BEGIN_NODE token stands in the structure. It holds until the next change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeOffset(usize);

/// A token, and where the next one stands.
enum Token<'a> {
    Begin(&'a [u8]),
    End,
    Prop { name: usize, value: std::ops::Range<usize> },
    Nop,
}

fn read_word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_be_bytes(*word))
}

fn write_word(bytes: &mut [u8], at: usize, value: usize) {
    let value = u32::try_from(value).unwrap_or(u32::MAX);
    if let Some(word) = bytes.get_mut(at..).and_then(|bytes| bytes.first_chunk_mut::<4>()) {
        *word = value.to_be_bytes();
    }
}

impl FdtEditor {
    /// Opens a tree of version 17 in a buffer of `capacity` bytes (fdt_open_into). A handover's is a page.
    ///
    /// # Errors
    /// As [`Fdt::parse`]; `BadVersion` for version 16; `BadBlock` for blocks out of the order header, reservations,
    /// structure, strings; `NoSpace` for a tree that is larger than the buffer.
    pub fn open_into(blob: &[u8], capacity: usize) -> Result<Self> {
        let fdt = Fdt::parse(blob)?;
        let blob = fdt.as_bytes();
        let field = |n: usize| read_word(blob, 4 * n).unwrap_or(0) as usize;
        let (structure, strings, map) = (field(2), field(3), field(4));
        let (strings_len, structure_len) = (field(8), field(9));
        if fdt.version() < 17 {
            let last_compatible = read_word(blob, 24).unwrap_or(0);
            return Err(problem(20, FdtProblem::BadVersion { version: fdt.version(), last_compatible }));
        }
        let map_len = MAP_ENTRY * (fdt.reservations().len() + 1);
        let ends = [(map, PACKED_MAP_START), (structure, map + map_len), (strings, structure + structure_len)];
        for ((start, least), block) in ends.into_iter().zip(["reservation map", "structure block", "strings block"]) {
            if start < least {
                let (start, len) = (start as u64, (least - start) as u64);
                return Err(problem(8, FdtProblem::BadBlock { block, start, len, have: blob.len() as u64 }));
            }
        }
        let cut = |start: usize, len: usize| blob.get(start..start + len).map(<[u8]>::to_vec).unwrap_or_default();
        let mut head = cut(0, HEADER_V17);
        head.extend_from_slice(&cut(map, map_len));
        let editor =
            FdtEditor { head, structure: cut(structure, structure_len), strings: cut(strings, strings_len), capacity };
        // libfdt keeps gaps between the blocks until it packs; they only count against the capacity.
        let gaps = blob.len().saturating_sub(editor.len());
        if editor.len() + gaps > capacity {
            return editor.no_space();
        }
        Ok(editor)
    }

    /// The root node.
    pub fn root(&self) -> NodeOffset {
        let mut at = 0;
        while read_word(&self.structure, at) == Some(NOP) {
            at += 4;
        }
        NodeOffset(at)
    }

    /// A subnode of exactly that name.
    ///
    /// # Errors
    /// `NoNode`.
    pub fn subnode(&self, parent: NodeOffset, name: &str) -> Result<NodeOffset> {
        let mut depth = 0;
        let mut at = parent.0;
        loop {
            let (token, next) = self.token(at)?;
            match token {
                Token::Begin(found) if depth == 1 && found == name.as_bytes() => return Ok(NodeOffset(at)),
                Token::Begin(_) => depth += 1,
                Token::End if depth <= 1 => return self.bad(at, FdtProblem::NoNode { path: name.to_owned() }),
                Token::End => depth -= 1,
                Token::Prop { .. } | Token::Nop => {}
            }
            at = next;
        }
    }

    /// Adds a subnode before the others (fdt_add_subnode).
    ///
    /// # Errors
    /// [`Error::Exists`]; `BadName`; `TooDeep`; `NoSpace`.
    pub fn add_subnode(&mut self, parent: NodeOffset, name: &str) -> Result<NodeOffset> {
        if printable(name.as_bytes()).is_none() {
            return self.bad(parent.0, FdtProblem::BadName);
        }
        if self.subnode(parent, name).is_ok() {
            return Err(Error::Exists { name: name.into() });
        }
        if self.depth_of(parent)? >= MAX_DEPTH {
            return self.bad(parent.0, FdtProblem::TooDeep { max: MAX_DEPTH });
        }
        let (_, mut at) = self.token(parent.0)?;
        while let (Token::Prop { .. } | Token::Nop, next) = self.token(at)? {
            at = next;
        }
        let mut node = BEGIN_NODE.to_be_bytes().to_vec();
        node.extend_from_slice(name.as_bytes());
        node.push(0);
        node.resize(node.len().next_multiple_of(4), 0);
        node.extend_from_slice(&END_NODE.to_be_bytes());
        self.check_room(node.len())?;
        self.structure.splice(at..at, node);
        Ok(NodeOffset(at))
    }

    /// Gives a node a property, a new one before its others (fdt_setprop).
    ///
    /// # Errors
    /// `BadName`; `NoSpace`.
    pub fn set_property(&mut self, node: NodeOffset, name: &str, value: &[u8]) -> Result<()> {
        if printable(name.as_bytes()).is_none() {
            return self.bad(node.0, FdtProblem::BadName);
        }
        let Some(padded) = align4(value.len()) else { return self.no_space() };
        let mut bytes = value.to_vec();
        bytes.resize(padded, 0);
        if let Some((at, old)) = self.property(node, name)? {
            let old = old.start..old.end.next_multiple_of(4).min(self.structure.len());
            self.check_room(padded.saturating_sub(old.len()))?;
            write_word(&mut self.structure, at + 4, value.len());
            self.structure.splice(old, bytes);
            return Ok(());
        }
        let text = [name.as_bytes(), b"\0"].concat();
        let known = memchr::memmem::find(&self.strings, &text);
        let (_, at) = self.token(node.0)?;
        self.check_room(12 + padded + if known.is_some() { 0 } else { text.len() })?;
        let mut property = vec![0; 12];
        write_word(&mut property, 0, PROP as usize);
        write_word(&mut property, 4, value.len());
        write_word(&mut property, 8, known.unwrap_or(self.strings.len()));
        property.extend_from_slice(&bytes);
        self.structure.splice(at..at, property);
        if known.is_none() {
            self.strings.extend_from_slice(&text);
        }
        Ok(())
    }

    /// Removes a property (fdt_delprop); its name stays in the strings.
    ///
    /// # Errors
    /// `NoProperty`.
    pub fn delete_property(&mut self, node: NodeOffset, name: &str) -> Result<()> {
        let Some((at, value)) = self.property(node, name)? else {
            return self.bad(node.0, FdtProblem::NoProperty { property: name.to_owned() });
        };
        let end = value.end.next_multiple_of(4).min(self.structure.len());
        self.structure.drain(at..end);
        Ok(())
    }

    /// Removes a node with all it holds (fdt_del_node).
    ///
    /// # Errors
    /// `BadNesting` for an offset of an earlier state.
    pub fn delete_node(&mut self, node: NodeOffset) -> Result<()> {
        let mut depth = 0;
        let mut at = node.0;
        loop {
            let (token, next) = self.token(at)?;
            match token {
                Token::Begin(_) => depth += 1,
                Token::End => depth -= 1,
                Token::Prop { .. } | Token::Nop => {}
            }
            at = next;
            if depth <= 0 {
                break;
            }
        }
        self.structure.drain(node.0..at);
        Ok(())
    }

    /// The blob, without room for more (fdt_pack).
    pub fn pack(&self) -> Vec<u8> {
        let structure = self.head.len();
        let strings = structure + self.structure.len();
        let mut blob = Vec::with_capacity(self.len());
        blob.extend_from_slice(&self.head);
        blob.extend_from_slice(&self.structure);
        blob.extend_from_slice(&self.strings);
        let fields = [(1, self.len()), (2, structure), (3, strings), (4, PACKED_MAP_START), (5, 17)];
        let lengths = [(8, self.strings.len()), (9, self.structure.len())];
        for (field, value) in fields.into_iter().chain(lengths) {
            write_word(&mut blob, 4 * field, value);
        }
        blob
    }

    /// Bytes of the packed tree.
    fn len(&self) -> usize {
        self.head.len() + self.structure.len() + self.strings.len()
    }

    fn check_room(&self, more: usize) -> Result<()> {
        match self.len().checked_add(more) {
            Some(len) if len <= self.capacity => Ok(()),
            _ => self.no_space(),
        }
    }

    fn no_space<T>(&self) -> Result<T> {
        self.bad(self.structure.len(), FdtProblem::NoSpace { capacity: self.capacity as u64 })
    }

    /// An error about the structure at `at`.
    fn bad<T>(&self, at: usize, what: FdtProblem) -> Result<T> {
        Err(problem(self.head.len() + at, what))
    }

    fn token(&self, at: usize) -> Result<(Token<'_>, usize)> {
        let nesting = || self.bad(at, FdtProblem::BadNesting { why: "no node of this tree begins or goes on here" });
        let Some(token) = read_word(&self.structure, at) else { return nesting() };
        let next = at + 4;
        match token {
            BEGIN_NODE => {
                let rest = self.structure.get(next..).unwrap_or_default();
                let Some(len) = memchr::memchr(0, rest) else { return nesting() };
                Ok((Token::Begin(&rest[..len]), (next + len + 1).next_multiple_of(4)))
            }
            END_NODE => Ok((Token::End, next)),
            NOP => Ok((Token::Nop, next)),
            PROP => {
                let len = read_word(&self.structure, next);
                let name = read_word(&self.structure, next + 4);
                let (Some(len), Some(name)) = (len, name) else { return nesting() };
                let value = next + 8..(next + 8).saturating_add(len as usize);
                match align4(value.end).filter(|end| *end <= self.structure.len()) {
                    Some(end) => Ok((Token::Prop { name: name as usize, value }, end)),
                    None => nesting(),
                }
            }
            END => nesting(),
            token => self.bad(at, FdtProblem::BadToken { token }),
        }
    }

    /// A node's first property of that name: where its token stands, and its value.
    fn property(&self, node: NodeOffset, name: &str) -> Result<Option<(usize, std::ops::Range<usize>)>> {
        let (Token::Begin(_), mut at) = self.token(node.0)? else {
            return self.bad(node.0, FdtProblem::BadNesting { why: "no node begins here" });
        };
        let text = [name.as_bytes(), b"\0"].concat();
        loop {
            let (token, next) = self.token(at)?;
            match token {
                Token::Prop { name, value } if self.strings.get(name..).is_some_and(|s| s.starts_with(&text)) => {
                    return Ok(Some((at, value)));
                }
                Token::Prop { .. } | Token::Nop => at = next,
                Token::Begin(_) | Token::End => return Ok(None),
            }
        }
    }

    /// How deep a node nests; the root is at 1.
    fn depth_of(&self, node: NodeOffset) -> Result<u32> {
        let (mut depth, mut at) = (0, 0);
        while at <= node.0 {
            let (token, next) = self.token(at)?;
            match token {
                Token::Begin(_) => depth += 1,
                Token::End => depth -= 1,
                Token::Prop { .. } | Token::Nop => {}
            }
            at = next;
        }
        Ok(depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdt::FdtWriter;
    use proptest::prelude::*;

    const PAGE: usize = 4096;
    const IN_FDT: &[u8] = include_bytes!("../../testdata/fdt/linux-7.3.4-in-fdt.dtb");
    const OUT_FDT: &[u8] = include_bytes!("../../testdata/fdt/linux-7.3.4-out-fdt.dtb");

    /// What the kernel writes at boot.
    fn boot(map: u64) -> Vec<u8> {
        let mut w = FdtWriter::new(PAGE);
        w.begin_node("").unwrap();
        w.property_str("compatible", "kho-v4").unwrap();
        w.property_u64("preserved-memory-map", map).unwrap();
        w.end_node().unwrap();
        w.finish().unwrap()
    }

    fn add(blob: &[u8], name: &str, phys: u64, size: u64) -> Result<Vec<u8>> {
        let mut e = FdtEditor::open_into(blob, PAGE)?;
        let node = e.add_subnode(e.root(), name)?;
        e.set_property(node, "preserved-data", &phys.to_le_bytes())?;
        e.set_property(node, "blob-size", &size.to_le_bytes())?;
        Ok(e.pack())
    }

    /// The subtrees in the order the kernel added them, which is the reverse of that in the tree.
    fn rebuilt(fdt: &Fdt) -> Vec<Vec<u8>> {
        let root = fdt.root().unwrap();
        let mut states = vec![boot(root.u64("preserved-memory-map").unwrap())];
        let subtrees: Vec<_> = root.children().collect();
        for node in subtrees.iter().rev() {
            let (phys, size) = (node.u64("preserved-data").unwrap(), node.u64("blob-size").unwrap());
            states.push(add(states.last().unwrap(), node.name(), phys, size).unwrap());
        }
        states
    }

    #[test]
    fn the_root_of_linux_7_3_is_rebuilt_byte_for_byte() {
        let states = rebuilt(&Fdt::parse(IN_FDT).unwrap());
        assert_eq!(states.last().unwrap(), IN_FDT);
        assert!(
            states.iter().any(|state| state.len() == OUT_FDT.len()),
            "debugfs shows the length at one of the steps"
        );
        assert_eq!(&IN_FDT[..OUT_FDT.len()], OUT_FDT);
    }

    #[test]
    fn a_subtree_that_goes_leaves_its_strings() {
        let boot = boot(0x1000);
        let two = add(&add(&boot, "a", 0x2000, 3).unwrap(), "b", 0x3000, 4).unwrap();
        let mut e = FdtEditor::open_into(&two, PAGE).unwrap();
        e.delete_node(e.subnode(e.root(), "b").unwrap()).unwrap();
        assert_eq!(e.pack(), add(&boot, "a", 0x2000, 3).unwrap());
        e.delete_node(e.subnode(e.root(), "a").unwrap()).unwrap();
        let none = e.pack();
        assert_eq!(Fdt::parse(&none).unwrap().nodes().len(), 1);
        assert_eq!(none.len(), boot.len() - 8 + "preserved-data\0blob-size\0".len());
        assert!(e.subnode(e.root(), "a").is_err());
    }

    #[test]
    fn what_is_refused_changes_nothing() {
        let blob = add(&boot(0x1000), "a", 0x2000, 3).unwrap();
        let mut e = FdtEditor::open_into(&blob, blob.len() + 20).unwrap();
        let before = e.clone();
        let root = e.root();
        assert!(matches!(e.add_subnode(root, "a"), Err(Error::Exists { .. })));
        for name in ["", "a\0b", "\n"] {
            assert!(e.add_subnode(root, name).is_err());
            assert!(e.set_property(root, name, b"").is_err());
        }
        assert!(e.add_subnode(root, "a name too long").unwrap_err().to_string().contains("does not fit"));
        assert!(e.set_property(root, "compatible", &[0; 40]).is_err());
        assert!(e.set_property(root, "new", &[0; 8]).is_err());
        assert!(e.delete_property(root, "new").is_err());
        assert_eq!(e, before);
        assert!(FdtEditor::open_into(&blob, blob.len() - 1).is_err());
    }

    #[test]
    fn a_property_is_replaced_in_place_and_a_new_one_comes_first() {
        let mut e = FdtEditor::open_into(&boot(0x1000), PAGE).unwrap();
        let root = e.root();
        e.set_property(root, "compatible", b"longer than before\0").unwrap();
        e.set_property(root, "map", b"").unwrap();
        let fdt = Fdt::parse(&e.pack()).unwrap();
        let names: Vec<_> = fdt.root().unwrap().properties().map(|p| p.name.unwrap()).collect();
        assert_eq!(names, ["map", "compatible", "preserved-memory-map"]);
        assert_eq!(fdt.root().unwrap().str("compatible").unwrap(), "longer than before");
        assert!(!e.strings.ends_with(b"map\0map\0"), "the tail of another name serves");
        e.delete_property(root, "compatible").unwrap();
        assert!(Fdt::parse(&e.pack()).unwrap().root().unwrap().prop("compatible").is_none());
    }

    proptest! {
        #[test]
        fn any_damage_is_refused_or_edited_without_panic(at in 0usize..405, value: u8, name in "[a-z]{1,12}") {
            let mut blob = IN_FDT.to_vec();
            blob[at] = value;
            if let Ok(mut e) = FdtEditor::open_into(&blob, PAGE) {
                let root = e.root();
                if let Ok(node) = e.add_subnode(root, &name) {
                    let _ = e.set_property(node, "blob-size", &[1; 9]);
                }
                let _ = e.set_property(root, &name, b"x");
                let _ = e.subnode(root, "LUO").and_then(|node| e.delete_node(node));
                prop_assert!(Fdt::parse(&e.pack()).is_ok());
            }
        }
    }
}
