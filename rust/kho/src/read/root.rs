//! The root FDT of a handover: which ABI, where the map is, which subtrees hang off it (abi.md section 2).

#![forbid(unsafe_code)]

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
    /// The ABI version.
    pub abi: &'static Abi,
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
/// written by finalizing: the kernels that edit such a root pass it on as it is, and the next one boots cold.
///
/// # Errors
/// As [`read_fdt`]; [`Error::UnsupportedAbi`]; [`Error::Root`] for a missing map, or one of 0 where it is always in force.
pub fn read_root(memory: &dyn PhysMemory, phys: Phys) -> Result<Root> {
    PageSize::Size4K.pfn_exact("FDT address", phys)?;
    let fdt = read_fdt(memory, phys)?;
    let root = fdt.root()?;
    let problem = |problem| Error::Root { phys: phys.0, problem };
    let malformed = |e: Error| problem(RootProblem::Malformed { why: e.to_string() });
    let compatible = root.str(COMPATIBLE_PROPERTY).map_err(malformed)?;
    let abi = Abi::named(compatible).filter(|abi| abi.decoded).ok_or_else(|| Error::UnsupportedAbi {
        phys: phys.0,
        compatible: compatible.into(),
        known: Abi::decoded(),
    })?;
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
    Ok(Root { abi, phys, map: Phys(map), subtrees, malformed: bad, fdt })
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
    root.str(COMPATIBLE_PROPERTY).is_ok_and(|c| c.starts_with("kho-v"))
}
