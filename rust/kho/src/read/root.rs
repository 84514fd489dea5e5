//! The root FDT of a handover: which ABI, where the map is, which subtrees hang off it (abi.md section 2).

#![forbid(unsafe_code)]

use crate::abi::composite::Composite;
use crate::abi::{Abi, COMPATIBLE_PROPERTY};
use crate::error::{Error, FdtProblem, Result, RootProblem};
use crate::fdt::{Fdt, Node};
use crate::memory::PhysMemory;
use crate::units::{PageSize, Phys};

/// The largest FDT there can be: the kernel gives it one page.
const MAX_FDT: u64 = PageSize::Size64K.bytes();
/// Bytes of an FDT header.
const HEADER: u64 = 40;

/// A producer's blob: a node of the root, as it stands there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subtree {
    /// The name of the node.
    pub name: String,
    /// The physical address of the blob.
    pub phys: Phys,
    /// Bytes, when known: `blob-size` (v3 and later), or what the blob's own FDT header says.
    pub size: Option<u64>,
}

/// A validated root.
#[derive(Debug)]
pub struct Root {
    /// The ABI version that it is read as.
    pub abi: &'static Abi,
    /// The `compatible` string that it has.
    pub compatible: String,
    /// Why it may not be what it is read as; empty if it names a version, released or draft.
    pub doubts: Vec<String>,
    /// The whole FDT.
    pub fdt: Fdt,
    /// The physical address of the FDT.
    pub phys: Phys,
    /// The physical address of the preserved-memory map; 0 while nothing was finalized, where an ABI has that step.
    pub map: Phys,
    /// In the order they stand in the FDT.
    pub subtrees: Vec<Subtree>,
    /// Nodes that are no valid subtree, with the reason (the kernel answers EINVAL for them).
    pub malformed: Vec<(String, String)>,
}

/// Reads the FDT that begins at `phys`, at most a page.
///
/// # Errors
/// [`Error::OutsideMemory`], or [`Error::Root`] with what the blob's own reader says.
pub fn read_fdt(memory: &dyn PhysMemory, phys: Phys) -> Result<Fdt> {
    let malformed = |e: &Error| Error::Root { phys: phys.0, problem: RootProblem::Malformed { why: e.to_string() } };
    let header = memory.read_vec("FDT header", phys, HEADER)?;
    let total = crate::fdt::totalsize(&header).ok_or_else(|| {
        let found = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
        malformed(&Error::Fdt { offset: 0, problem: FdtProblem::BadMagic { found } })
    })?;
    if u64::from(total) > MAX_FDT {
        let problem = FdtProblem::BadBlock { block: "totalsize", start: 0, len: total.into(), have: MAX_FDT };
        return Err(malformed(&Error::Fdt { offset: 4, problem }));
    }
    let blob = memory.read_vec("FDT", phys, total.into())?;
    Fdt::parse(&blob).map_err(|e| malformed(&e))
}

/// Reads and validates a root as the next kernel does: header, `compatible`, the map. A map of 0 is real where the map is
/// written by finalizing: the kernels that edit such a root pass it on as it is, and the next one boots cold. A version that
/// is not known is read as the one that its properties fit best.
///
/// # Errors
/// As [`read_fdt`]; [`Error::UnsupportedAbi`] for a version that is not known and fits none; [`Error::Root`] for a missing
/// map, or one of 0 where it is always in force.
pub fn read_root(memory: &dyn PhysMemory, phys: Phys) -> Result<Root> {
    // There is one, or an error.
    read_roots(memory, phys).map(|mut roots| roots.swap_remove(0))
}

/// Reads a root in each way that it may be meant, the most plausible first: one if its `compatible` names a version.
///
/// # Errors
/// As [`read_root`].
pub fn read_roots(memory: &dyn PhysMemory, phys: Phys) -> Result<Vec<Root>> {
    PageSize::Size4K.pfn_exact("FDT address", phys)?;
    let fdt = read_fdt(memory, phys)?;
    let mut roots = Vec::new();
    let mut first_error = None;
    for (abi, doubts) in versions(&fdt, phys)? {
        match as_version(memory, phys, &fdt, abi, doubts) {
            Ok(root) => roots.push(root),
            Err(e) => _ = first_error.get_or_insert(e),
        }
    }
    match first_error {
        Some(e) if roots.is_empty() => Err(e),
        _ => Ok(roots),
    }
}

/// As which versions a root FDT may be read, the most plausible first, each with what speaks against it: one without
/// doubts if `compatible` names it. A version that is not known is read as those whose properties it has.
///
/// # Errors
/// [`Error::Root`] without a `compatible`; [`Error::UnsupportedAbi`] if it fits no version.
pub fn versions(fdt: &Fdt, phys: Phys) -> Result<Vec<(&'static Abi, Vec<String>)>> {
    let root = fdt.root()?;
    let malformed = |e: Error| Error::Root { phys: phys.0, problem: RootProblem::Malformed { why: e.to_string() } };
    let compatible = root.str(COMPATIBLE_PROPERTY).map_err(malformed)?;
    let decoded = |name: &str| Abi::named(name).filter(|abi| abi.decoded);
    if let Some(abi) = decoded(compatible) {
        return Ok(vec![(abi, Vec::new())]);
    }
    let composite = Composite::of(compatible);
    let base = decoded(composite.base);
    let misfits = |abi: &Abi| {
        let has = |node: &Node<'_>, property: &str| node.u64(property).is_ok();
        let fits = |n: &Node<'_>| has(n, abi.subtree_property) && abi.size_property.is_none_or(|size| has(n, size));
        root.children().filter(|node| !fits(node)).count()
    };
    let mut rows: Vec<&'static Abi> = Abi::layouts();
    rows.retain(|abi| root.prop(abi.map_property).is_some());
    // Stable: of those that fit alike the newest stays first.
    rows.sort_by_cached_key(|abi| misfits(abi));
    if let Some(base) = base {
        rows.retain(|abi| !abi.is_laid_out_as(base));
        rows.insert(0, base);
    }
    if rows.is_empty() || (base.is_none() && !is_version(compatible)) {
        return Err(unsupported(phys, compatible));
    }
    Ok(rows.into_iter().map(|abi| (abi, doubts(&composite, base, abi))).collect())
}

/// The error for a version that is not known.
pub fn unsupported(phys: Phys, compatible: &str) -> Error {
    Error::UnsupportedAbi { phys: phys.0, compatible: compatible.into(), known: Abi::decoded() }
}

/// Why a root whose `compatible` names no version may not be one of `abi`.
fn doubts(composite: &Composite<'_>, base: Option<&Abi>, abi: &Abi) -> Vec<String> {
    const MOST_SHOWN: usize = 48;
    let mut doubts = composite.doubts();
    let as_named = base.is_some_and(|base| base.compatible == abi.compatible);
    if !as_named {
        let shown: String = composite.base.chars().take(MOST_SHOWN).collect();
        doubts.insert(0, format!("version {shown:?} is not known: read as {}", abi.compatible));
    } else if doubts.is_empty() {
        doubts.push(format!("a combination of parts that no draft has: read as {}", abi.compatible));
    }
    doubts
}

/// Reads the root as one of a version.
fn as_version(memory: &dyn PhysMemory, phys: Phys, fdt: &Fdt, abi: &'static Abi, doubts: Vec<String>) -> Result<Root> {
    let root = fdt.root()?;
    let problem = |problem| Error::Root { phys: phys.0, problem };
    let malformed = |e: Error| problem(RootProblem::Malformed { why: e.to_string() });
    let compatible = root.str(COMPATIBLE_PROPERTY).map_err(malformed)?.to_string();
    if root.prop(abi.map_property).is_none() {
        return Err(problem(RootProblem::MapMissing));
    }
    let map = root.u64(abi.map_property).map_err(malformed)?;
    if map == 0 && abi.live {
        return Err(problem(RootProblem::MapIsZero));
    }
    let mut subtrees = Vec::new();
    let mut bad = Vec::new();
    for node in root.children() {
        match subtree(memory, abi, node) {
            Ok(subtree) => subtrees.push(subtree),
            Err(e) => bad.push((node.name().to_string(), e.to_string())),
        }
    }
    Ok(Root { abi, compatible, doubts, phys, map: Phys(map), subtrees, malformed: bad, fdt: fdt.clone() })
}

fn subtree(memory: &dyn PhysMemory, abi: &Abi, node: Node<'_>) -> Result<Subtree> {
    let phys = Phys(node.u64(abi.subtree_property)?);
    let size = match abi.size_property {
        Some(property) => Some(node.u64(property)?),
        None => fdt_size(memory, phys),
    };
    Ok(Subtree { name: node.name().to_string(), phys, size })
}

/// The size of the FDT at `phys`, if one is there.
fn fdt_size(memory: &dyn PhysMemory, phys: Phys) -> Option<u64> {
    let header = memory.read_vec("FDT header", phys, HEADER).ok()?;
    let total = u64::from(crate::fdt::totalsize(&header)?);
    memory.contains(phys, total).then_some(total)
}

/// Whether the FDT at `phys` is a handover's root, of any version: for finding one among other devicetrees.
pub fn is_root(memory: &dyn PhysMemory, phys: Phys) -> bool {
    let Ok(fdt) = read_fdt(memory, phys) else { return false };
    let Ok(root) = fdt.root() else { return false };
    root.str(COMPATIBLE_PROPERTY).is_ok_and(is_version)
}

/// Whether a `compatible` is that of a handover, of any version.
fn is_version(compatible: &str) -> bool {
    compatible.starts_with("kho-v")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fdt::FdtWriter;

    fn root(compatible: &str, properties: &[&str], of_node: &[&str]) -> Fdt {
        let mut w = FdtWriter::new(4096);
        w.begin_node("").unwrap();
        w.property_str(COMPATIBLE_PROPERTY, compatible).unwrap();
        for name in properties {
            w.property_u64(name, 0x1000).unwrap();
        }
        w.begin_node("LUO").unwrap();
        for name in of_node {
            w.property_u64(name, 0x2000).unwrap();
        }
        w.end_node().unwrap();
        w.end_node().unwrap();
        Fdt::parse(&w.finish().unwrap()).unwrap()
    }

    fn read_as(fdt: &Fdt) -> Vec<&'static str> {
        versions(fdt, Phys(0)).unwrap_or_default().iter().map(|(abi, _)| abi.compatible).collect()
    }

    #[test]
    fn a_known_version_is_read_as_itself_alone() {
        for abi in crate::abi::ABIS.iter().chain(&crate::abi::DRAFTS) {
            let fdt = root(abi.compatible, &[abi.map_property], &[]);
            assert_eq!(
                versions(&fdt, Phys(0)).unwrap().iter().map(|(_, doubts)| doubts.len()).collect::<Vec<_>>(),
                [0]
            );
            assert_eq!(read_as(&fdt), [abi.compatible]);
        }
    }

    #[test]
    fn an_unknown_version_is_read_first_as_the_one_whose_properties_it_has() {
        let map = &["preserved-memory-map"];
        let first = |of_node: &[&str]| read_as(&root("kho-v9", map, of_node))[0];
        assert_eq!(first(&["preserved-data", "blob-size"]), "kho-v4");
        assert_eq!(first(&["preserved-data"]), "kho-v2");
        assert_eq!(first(&["fdt"]), "kho-v1");
        assert_eq!(read_as(&root("kho-v9", map, &["fdt"])).len(), 3);
        assert_eq!(read_as(&root("kho-v2;radix-v9", map, &["fdt"]))[0], "kho-v2");
        for (compatible, properties) in [("kho-v9", &["map"][..]), ("acme,board", map), ("", map), (";kho-v4", map)] {
            assert!(read_as(&root(compatible, properties, &["fdt"])).is_empty(), "{compatible}");
        }
    }
}
