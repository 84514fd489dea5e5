//! The reader: one pass over the tokens, no recursion, everything checked before it is kept.

#![forbid(unsafe_code)]

use super::{
    BEGIN_NODE, END, END_NODE, HEADER_V16, HEADER_V17, MAGIC, MAX_DEPTH, MAX_NAME, NOP, PROP, align4, printable,
    problem,
};
use crate::error::{Error, FdtProblem, Result};
use std::num::NonZeroU32;
use std::ops::Range;

/// What a name that cannot be shown is shown as.
const NO_NAME: &str = "\u{fffd}";

/// A devicetree blob, checked and copied: at most `totalsize` bytes and an index of its nodes and properties.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fdt {
    blob: Vec<u8>,
    totalsize: u32,
    version: u32,
    boot_cpuid: u32,
    reservations: Vec<(u64, u64)>,
    /// In the order of the structure block: parents before children.
    nodes: Vec<NodeEntry>,
    /// Those of a node are adjacent.
    props: Vec<PropEntry>,
}

/// Bytes of the blob. A blob is at most 4 GiB, for `totalsize` is 32 bits wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: u32,
    end: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct NodeEntry {
    offset: u32,
    name: Option<Span>,
    first_prop: u32,
    nr_props: u32,
    parent: Option<u32>,
    // Neither is ever the root, whose index is 0.
    first_child: Option<NonZeroU32>,
    next_sibling: Option<NonZeroU32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct PropEntry {
    offset: u32,
    name_offset: u32,
    name: Option<Span>,
    value: Span,
}

/// A node that is still open while the tokens are read.
struct Open {
    node: u32,
    last_child: Option<NonZeroU32>,
}

/// The blob's size in bytes according to the first 8 bytes of its header; `None` if they are no header's.
pub fn totalsize(header: &[u8]) -> Option<u32> {
    (be32(header, 0)? == MAGIC).then_some(be32(header, 4)?)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(word.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let word = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(word.try_into().ok()?))
}

/// Offsets inside a blob fit 32 bits, because the blob was cut at `totalsize`.
fn narrow(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}

impl Fdt {
    /// Reads a blob. Bytes after its `totalsize` are ignored: the kernel hands over a page.
    ///
    /// # Errors
    /// [`Error::Fdt`] with the offset of the first thing that is wrong: magic, version, blocks outside the blob or
    /// overlapping, an unknown token, an invalid name or name offset, nodes that do not nest, no END.
    pub fn parse(bytes: &[u8]) -> Result<Fdt> {
        match Self::parse_partial(bytes)? {
            (fdt, None) => Ok(fdt),
            (_, Some(first_problem)) => Err(first_problem),
        }
    }

    /// Reads what can be read, and says what is wrong: the very error [`Fdt::parse`] gives.
    ///
    /// A property whose name is lost (its string block is cut off, as in the `out/fdt` of debugfs from Linux 6.19 on) is
    /// kept with its value and name offset. Nodes and properties are in the blob's order up to where it breaks.
    ///
    /// # Errors
    /// [`Error::Fdt`] when this is no header at all: under 36 (version 16) or 40 bytes, magic, version.
    pub fn parse_partial(bytes: &[u8]) -> Result<(Fdt, Option<Error>)> {
        let header = Header::parse(bytes)?;
        let have = bytes.len().min(header.totalsize as usize);
        let mut parser = Parser {
            fdt: Fdt {
                blob: bytes[..have].to_vec(),
                totalsize: header.totalsize,
                version: header.version,
                boot_cpuid: header.boot_cpuid,
                reservations: Vec::new(),
                nodes: Vec::new(),
                props: Vec::new(),
            },
            first_problem: None,
        };
        if bytes.len() < header.totalsize as usize {
            let need = u64::from(header.totalsize);
            let have = bytes.len() as u64;
            parser.note(bytes.len(), FdtProblem::Truncated { need, have });
        }
        parser.check_blocks(&header);
        parser.read_reservations(&header);
        if let Err(stop) = parser.read_structure(&header) {
            parser.first_problem.get_or_insert(stop);
        }
        Ok((parser.fdt, parser.first_problem))
    }

    /// The size the header claims, in bytes; more than [`Fdt::as_bytes`] has if the blob is cut short.
    pub fn totalsize(&self) -> u32 {
        self.totalsize
    }

    /// The format's version: 17, or 16 of old.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The physical id of the boot CPU; 0 in a handover.
    pub fn boot_cpuid(&self) -> u32 {
        self.boot_cpuid
    }

    /// The blob, without what followed it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.blob
    }

    /// The memory reservation map, `(address, size)` in bytes; empty in a handover.
    pub fn reservations(&self) -> &[(u64, u64)] {
        &self.reservations
    }

    /// The root node, `/`.
    ///
    /// # Errors
    /// `NoNode` if a partial read did not come as far.
    pub fn root(&self) -> Result<Node<'_>> {
        self.node_at(0).ok_or_else(|| no_node(0, "/"))
    }

    /// The node at a path such as `/a/b`. Empty components are skipped, as libfdt does.
    ///
    /// # Errors
    /// `NoNode` with the path.
    pub fn node(&self, path: &str) -> Result<Node<'_>> {
        let below_root = path.strip_prefix('/').ok_or_else(|| no_node(0, path))?;
        let mut node = self.root()?;
        for name in below_root.split('/').filter(|name| !name.is_empty()) {
            node = node.child(name).ok_or_else(|| no_node(node.entry().offset as usize, path))?;
        }
        Ok(node)
    }

    /// Every node, parents before children, in the blob's order.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = Node<'_>> + ExactSizeIterator {
        (0..self.nodes.len()).map(|index| Node { fdt: self, index: narrow(index) })
    }

    /// The node with that [`Node::index`].
    pub fn node_at(&self, index: u32) -> Option<Node<'_>> {
        ((index as usize) < self.nodes.len()).then_some(Node { fdt: self, index })
    }

    fn bytes(&self, span: Span) -> &[u8] {
        &self.blob[span.start as usize..span.end as usize]
    }

    fn text(&self, span: Span) -> &str {
        std::str::from_utf8(self.bytes(span)).unwrap_or(NO_NAME)
    }
}

fn no_node(offset: usize, path: &str) -> Error {
    let path = path.to_owned();
    problem(offset, FdtProblem::NoNode { path })
}

/// One node of an [`Fdt`]; two words, to be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Node<'a> {
    fdt: &'a Fdt,
    index: u32,
}

/// One property.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Property<'a> {
    /// `None` if the name is not there to read, which only a partial read lets pass.
    pub name: Option<&'a str>,
    /// Where in the strings block the name is said to be, in bytes.
    pub name_offset: u32,
    /// The bytes of the value, without padding.
    pub value: &'a [u8],
    /// Where in the blob its token stands, in bytes.
    pub offset: u32,
}

impl<'a> Node<'a> {
    fn entry(self) -> &'a NodeEntry {
        &self.fdt.nodes[self.index as usize]
    }

    /// Its place in [`Fdt::nodes`]; the root is 0.
    pub fn index(self) -> u32 {
        self.index
    }

    /// Where in the blob its token stands, in bytes.
    pub fn offset(self) -> u32 {
        self.entry().offset
    }

    /// The name: empty for the root, U+FFFD where a partial read let an unprintable one pass.
    pub fn name(self) -> &'a str {
        match self.entry().name {
            Some(span) => self.fdt.text(span),
            None => NO_NAME,
        }
    }

    /// The path from the root, `/` for the root itself.
    pub fn path(self) -> String {
        let ancestors = std::iter::successors(Some(self), |n| n.parent());
        let names: Vec<&str> = ancestors.filter(|n| n.index != 0).map(Node::name).collect();
        let mut path = String::new();
        for name in names.iter().rev() {
            path.push('/');
            path.push_str(name);
        }
        if path.is_empty() {
            path.push('/');
        }
        path
    }

    /// The node that contains this one; `None` for the root.
    pub fn parent(self) -> Option<Node<'a>> {
        let index = self.entry().parent?;
        Some(Node { index, ..self })
    }

    /// The nodes directly below, in the blob's order.
    pub fn children(self) -> impl Iterator<Item = Node<'a>> {
        let at = move |index: NonZeroU32| Node { fdt: self.fdt, index: index.get() };
        let first = self.entry().first_child.map(at);
        std::iter::successors(first, move |n| n.entry().next_sibling.map(at))
    }

    /// The first child of exactly that name.
    pub fn child(self, name: &str) -> Option<Node<'a>> {
        self.children().find(|n| n.name() == name)
    }

    /// The properties in the blob's order.
    pub fn properties(self) -> impl DoubleEndedIterator<Item = Property<'a>> + ExactSizeIterator {
        let entry = self.entry();
        let first = entry.first_prop as usize;
        let fdt = self.fdt;
        fdt.props[first..first + entry.nr_props as usize].iter().map(move |p| Property {
            name: p.name.map(|span| fdt.text(span)),
            name_offset: p.name_offset,
            value: fdt.bytes(p.value),
            offset: p.offset,
        })
    }

    fn find(self, name: &str) -> Option<Property<'a>> {
        self.properties().find(|p| p.name == Some(name))
    }

    /// The first property of that name, as libfdt takes it.
    pub fn prop(self, name: &str) -> Option<&'a [u8]> {
        self.find(name).map(|p| p.value)
    }

    fn require(self, name: &str) -> Result<Property<'a>> {
        self.find(name).ok_or_else(|| {
            let property = name.to_owned();
            problem(self.offset() as usize, FdtProblem::NoProperty { property })
        })
    }

    fn word<const N: usize>(self, name: &str) -> Result<[u8; N]> {
        let found = self.require(name)?;
        found.value.try_into().map_err(|_| {
            let wrong =
                FdtProblem::BadLength { property: name.to_owned(), need: N as u64, have: found.value.len() as u64 };
            problem(found.offset as usize, wrong)
        })
    }

    /// A property of 4 bytes, native-endian.
    ///
    /// # Errors
    /// `NoProperty`, `BadLength`.
    pub fn u32(self, name: &str) -> Result<u32> {
        self.word(name).map(u32::from_le_bytes)
    }

    /// A property of 8 bytes, native-endian.
    ///
    /// # Errors
    /// `NoProperty`, `BadLength`.
    pub fn u64(self, name: &str) -> Result<u64> {
        self.word(name).map(u64::from_le_bytes)
    }

    /// A property that is one NUL-terminated string; without its NUL.
    ///
    /// # Errors
    /// `NoProperty`; `BadString` if it has no NUL at its end, another inside, or is not UTF-8.
    pub fn str(self, name: &str) -> Result<&'a str> {
        let found = self.require(name)?;
        match strings(found.value).as_deref() {
            Some([one]) => Ok(one),
            _ => Err(bad_string(name, found)),
        }
    }

    /// A property that is any number of NUL-terminated strings, one after the other.
    ///
    /// # Errors
    /// `NoProperty`; `BadString` if the last has no NUL or one is not UTF-8.
    pub fn strings(self, name: &str) -> Result<Vec<&'a str>> {
        let found = self.require(name)?;
        strings(found.value).ok_or_else(|| bad_string(name, found))
    }
}

fn strings(value: &[u8]) -> Option<Vec<&str>> {
    let Some((last, body)) = value.split_last() else {
        return Some(Vec::new());
    };
    if *last != 0 {
        return None;
    }
    body.split(|&byte| byte == 0).map(|text| std::str::from_utf8(text).ok()).collect()
}

fn bad_string(name: &str, found: Property<'_>) -> Error {
    let property = name.to_owned();
    problem(found.offset as usize, FdtProblem::BadString { property })
}

struct Header {
    totalsize: u32,
    version: u32,
    boot_cpuid: u32,
    len: usize,
    map: usize,
    strings: Range<usize>,
    structure: Range<usize>,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Header> {
        let have = bytes.len() as u64;
        let short = |len: usize| {
            let need = len as u64;
            problem(0, FdtProblem::Truncated { need, have })
        };
        let magic = be32(bytes, 0).ok_or_else(|| short(HEADER_V17))?;
        if magic != MAGIC {
            return Err(problem(0, FdtProblem::BadMagic { found: magic }));
        }
        let field = |at: usize| be32(bytes, at).ok_or_else(|| short(HEADER_V17));
        let (version, last_compatible) = (field(20)?, field(24)?);
        if version < 16 || last_compatible > 17 || last_compatible > version {
            let bad = FdtProblem::BadVersion { version, last_compatible };
            return Err(problem(20, bad));
        }
        let totalsize = field(4)?;
        let structure = field(8)? as usize;
        let strings = field(12)? as usize;
        let map = field(16)? as usize;
        let boot_cpuid = field(28)?;
        let strings_len = field(32)? as usize;
        let (len, structure_end) = if version == 16 {
            // Version 16 does not say; the block ends where the next begins.
            let end = if strings > structure { strings.min(totalsize as usize) } else { totalsize as usize };
            (HEADER_V16, end.max(structure))
        } else {
            let structure_len = field(36)? as usize;
            (HEADER_V17, structure.saturating_add(structure_len))
        };
        Ok(Header {
            totalsize,
            version,
            boot_cpuid,
            len,
            map,
            strings: strings..strings.saturating_add(strings_len),
            structure: structure..structure_end,
        })
    }

    /// Where the reservation map ends at the latest: at the next block.
    fn map_limit(&self) -> usize {
        [self.structure.start, self.strings.start]
            .into_iter()
            .filter(|&start| start >= self.map)
            .fold(self.totalsize as usize, usize::min)
    }
}

struct Parser {
    fdt: Fdt,
    first_problem: Option<Error>,
}

impl Parser {
    /// A problem that does not stop the reading. The first one counts.
    fn note(&mut self, offset: usize, what: FdtProblem) {
        self.first_problem.get_or_insert_with(|| problem(offset, what));
    }

    fn check_blocks(&mut self, header: &Header) {
        let total = header.totalsize as usize;
        let bad = |block, range: &Range<usize>| FdtProblem::BadBlock {
            block,
            start: range.start as u64,
            len: range.len() as u64,
            have: total as u64,
        };
        for (field, block, range, align) in [
            (8, "structure block", &header.structure, 4),
            (12, "strings block", &header.strings, 1),
            (16, "reservation map", &(header.map..header.map), 8),
        ] {
            if range.start < header.len || range.start > total || range.end > total {
                self.note(field, bad(block, range));
            } else if !range.start.is_multiple_of(align) {
                let misaligned = FdtProblem::MisalignedBlock { block, start: range.start as u64, align: align as u64 };
                self.note(field, misaligned);
            }
        }
        let (structure, strings) = (&header.structure, &header.strings);
        if structure.start < strings.end && strings.start < structure.end {
            self.note(12, bad("strings block", strings));
        }
        if structure.contains(&header.map) || strings.contains(&header.map) {
            self.note(16, bad("reservation map", &(header.map..header.map)));
        }
    }

    fn read_reservations(&mut self, header: &Header) {
        let limit = header.map_limit().min(self.fdt.blob.len());
        let mut at = header.map;
        loop {
            let bytes = &self.fdt.blob[..limit];
            match (be64(bytes, at), be64(bytes, at.saturating_add(8))) {
                (Some(0), Some(0)) => return,
                (Some(start), Some(size)) => self.fdt.reservations.push((start, size)),
                _ => {
                    let unterminated = FdtProblem::BadBlock {
                        block: "reservation map",
                        start: header.map as u64,
                        len: (at.saturating_add(16).saturating_sub(header.map)) as u64,
                        have: header.map_limit() as u64,
                    };
                    return self.note(16, unterminated);
                }
            }
            at = at.saturating_add(16);
        }
    }

    /// The name that starts at `at` and ends before `end`; `Err` if it has no end.
    fn terminated(&self, at: usize, end: usize) -> Result<Span, FdtProblem> {
        let end = end.min(at.saturating_add(MAX_NAME + 1));
        let bytes = self.fdt.blob.get(at..end).ok_or(FdtProblem::BadName)?;
        let len = memchr::memchr(0, bytes).ok_or(FdtProblem::BadName)?;
        Ok(Span { start: narrow(at), end: narrow(at + len) })
    }

    /// Reads the tokens up to END, or to the problem that makes the rest unreadable.
    fn read_structure(&mut self, header: &Header) -> Result<()> {
        let end = header.structure.end.min(self.fdt.blob.len());
        let mut at = header.structure.start;
        let mut open: Vec<Open> = Vec::new();
        loop {
            let offset = at;
            let token = self.word(offset, end)?;
            at = offset + 4;
            match token {
                BEGIN_NODE => at = self.begin_node(offset, end, &mut open)?,
                PROP => at = self.property(offset, end, header, &open)?,
                END_NODE => {
                    if open.pop().is_none() {
                        return Err(nesting(offset, "END_NODE without a node"));
                    }
                }
                NOP => {}
                END if !open.is_empty() => {
                    return Err(nesting(offset, "END inside a node"));
                }
                END if self.fdt.nodes.is_empty() => {
                    return Err(nesting(offset, "END before the root node"));
                }
                END => return Ok(()),
                token => return Err(problem(offset, FdtProblem::BadToken { token })),
            }
        }
    }

    fn word(&self, at: usize, end: usize) -> Result<u32> {
        be32(&self.fdt.blob[..end], at).ok_or_else(|| {
            let have = end.saturating_sub(at) as u64;
            problem(at, FdtProblem::Truncated { need: 4, have })
        })
    }

    fn begin_node(&mut self, offset: usize, end: usize, open: &mut Vec<Open>) -> Result<usize> {
        if open.is_empty() && !self.fdt.nodes.is_empty() {
            return Err(nesting(offset, "a second root node"));
        }
        if open.len() >= MAX_DEPTH as usize {
            return Err(problem(offset, FdtProblem::TooDeep { max: MAX_DEPTH }));
        }
        let span = self.terminated(offset + 4, end).map_err(|bad| problem(offset + 4, bad))?;
        let text = self.fdt.bytes(span);
        let name = if open.is_empty() { text.is_empty() } else { printable(text).is_some() };
        if !name && open.is_empty() {
            self.note(offset + 4, FdtProblem::BadNesting { why: "the root node has a name" });
        } else if !name {
            self.note(offset + 4, FdtProblem::BadName);
        }

        let index = narrow(self.fdt.nodes.len());
        self.fdt.nodes.push(NodeEntry {
            offset: narrow(offset),
            name: name.then_some(span),
            first_prop: narrow(self.fdt.props.len()),
            nr_props: 0,
            parent: open.last().map(|o| o.node),
            first_child: None,
            next_sibling: None,
        });
        if let Some(parent) = open.last_mut() {
            let this = NonZeroU32::new(index);
            match parent.last_child {
                Some(last) => self.fdt.nodes[last.get() as usize].next_sibling = this,
                None => self.fdt.nodes[parent.node as usize].first_child = this,
            }
            parent.last_child = this;
        }
        open.push(Open { node: index, last_child: None });
        self.next(span.end as usize + 1)
    }

    fn property(&mut self, offset: usize, end: usize, header: &Header, open: &[Open]) -> Result<usize> {
        let Some(node) = open.last() else {
            return Err(nesting(offset, "a property outside of any node"));
        };
        if node.last_child.is_some() {
            return Err(nesting(offset, "a property after a subnode, where libfdt does not look"));
        }
        let node = node.node as usize;
        let len = self.word(offset + 4, end)?;
        let name_offset = self.word(offset + 8, end)?;
        let start = offset + 12;
        let value_end = start.checked_add(len as usize).filter(|&value_end| value_end <= end).ok_or_else(|| {
            let (need, have) = (u64::from(len), (end - start) as u64);
            problem(start, FdtProblem::Truncated { need, have })
        })?;
        let name = self.property_name(offset, name_offset, header);
        self.fdt.props.push(PropEntry {
            offset: narrow(offset),
            name_offset,
            name,
            value: Span { start: narrow(start), end: narrow(value_end) },
        });
        self.fdt.nodes[node].nr_props += 1;
        self.next(value_end)
    }

    fn property_name(&mut self, offset: usize, name_offset: u32, header: &Header) -> Option<Span> {
        let strings_end = header.strings.end.min(self.fdt.blob.len());
        let at = header.strings.start.saturating_add(name_offset as usize);
        if at >= strings_end {
            let missing = FdtProblem::BadStringOffset { offset: name_offset };
            self.note(offset + 8, missing);
            return None;
        }
        let name = self.terminated(at, strings_end).ok().filter(|&span| printable(self.fdt.bytes(span)).is_some());
        if name.is_none() {
            self.note(at, FdtProblem::BadName);
        }
        name
    }

    /// The token after the item that ends at `end`.
    fn next(&self, end: usize) -> Result<usize> {
        align4(end).ok_or_else(|| problem(end, FdtProblem::BadName))
    }
}

fn nesting(offset: usize, why: &'static str) -> Error {
    problem(offset, FdtProblem::BadNesting { why })
}
