//! Bulk checks and the join of owners with pages, for `kho.verify` and `kho.owners`.

#![forbid(unsafe_code)]

use crate::errors::{OrRaise, to_py};
use crate::incoming::PyIncoming;
use crate::memory::{memory_of, with_progress};
use crate::payload::{PyMemfd, PyVmalloc};
use crate::reader::reading;
use kho::Error;
use kho::find::{Pointer, read_scratch, soundness};
use kho::memory::PhysRange;
use kho::owners::{Claims, Owners, Row, join, orders_of, totals};
use kho::payload::MemfdVersion;
use kho::payload::unlisted::Unlisted;
use kho::units::{PageSize, Phys};
use kho::verify::{Hits, NodeRange, check, check_memfd};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use std::sync::Arc;

/// Find the traces of handovers in a memory, whether or not they can be read.
///
/// Args:
///     memory: a `Memory` or `Arena`.
///     progress: called with the number of bytes searched so far; an exception that it raises ends the call.
///
/// Returns: the physical addresses of root FDTs; (FDT, scratch array, its bytes) for each place where a kernel was told
/// of a handover, if something like scratch areas is listed there, the soundest first; and (phys, areas) of each page
/// that can be a scratch array, with the (addr, nbytes) it lists.
///
/// Raises: SourceError on a read error.
///
/// Source: abi.md section 2.
#[pyfunction]
#[pyo3(signature = (memory, progress = None))]
#[expect(clippy::type_complexity, reason = "a tuple for Python")]
pub(crate) fn find_memory(
    py: Python<'_>,
    memory: &Bound<'_, PyAny>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Vec<u64>, Vec<(u64, u64, u64)>, Vec<(u64, Vec<(u64, u64)>)>)> {
    let memory = memory_of(memory)?;
    let found = with_progress(py, progress, |told| kho::find::find(&*memory, told))?;
    let fdts = found.fdts.iter().map(|phys| phys.0).collect();
    let sound = |p: &Pointer| {
        let areas = read_scratch(&*memory, p.scratch, p.scratch_len).ok()?;
        soundness(&*memory, &areas)
    };
    let mut pointers: Vec<_> = reading(py, || found.pointers.iter().filter_map(|p| Some((sound(p)?, p))).collect())?;
    pointers.sort_by_key(|(soundness, _)| std::cmp::Reverse(*soundness));
    let pointers = pointers.iter().map(|(_, p)| (p.fdt.0, p.scratch.0, p.scratch_len)).collect();
    let arrays = found.scratch_arrays.iter();
    let arrays = arrays.map(|(phys, areas)| (phys.0, areas.iter().map(|a| (a.addr, a.size)).collect())).collect();
    Ok((fdts, pointers, arrays))
}

/// (number of places, [(phys, pages, order, other)] of the first ones), for Python.
fn hits<'py>(py: Python<'py>, hits: &Hits) -> PyResult<Bound<'py, PyTuple>> {
    let spots: Vec<_> = hits.spots.iter().map(|s| (s.phys.0, s.pages, s.order.get(), s.other)).collect();
    (hits.count, spots).into_pyobject(py)
}

/// Check a map by runs: against itself, its memory, scratch, and NUMA nodes.
///
/// Args:
///     inc: the handover.
///     nodes: NUMA memory, as (start, nbytes, node).
///     most: the number of places to list for each condition.
///
/// Returns: a dict. `overlapping`, `in_scratch`, `outside`, `nodes_in_scratch`, `nodes_preserved` and `spanning` are
/// (number of places, [(phys, pages, order, other)] of the first ones); `empty` is [(order, empty bitmaps, bitmaps)].
#[pyfunction]
#[pyo3(signature = (inc, nodes = Vec::new(), most = 16))]
pub(crate) fn check_map<'py>(
    py: Python<'py>,
    inc: &PyIncoming,
    nodes: Vec<(u64, u64, u32)>,
    most: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let numa: Vec<NodeRange> =
        nodes.into_iter().map(|(start, len, node)| NodeRange { start: Phys(start), len, node }).collect();
    let checks = py.detach(|| check(&inc.inner, &numa, most));
    let dict = PyDict::new(py);
    dict.set_item("overlapping", hits(py, &checks.overlapping)?)?;
    dict.set_item("in_scratch", hits(py, &checks.in_scratch)?)?;
    dict.set_item("outside", hits(py, &checks.outside)?)?;
    dict.set_item("nodes_in_scratch", hits(py, &checks.nodes_in_scratch)?)?;
    dict.set_item("nodes_preserved", hits(py, &checks.nodes_preserved)?)?;
    dict.set_item("spanning", hits(py, &checks.spanning)?)?;
    let empty: Vec<_> = checks.empty.iter().map(|(order, empty, all)| (order.get(), *empty, *all)).collect();
    dict.set_item("empty", empty)?;
    Ok(dict)
}

/// Check a memfd's list of folios.
///
/// Args:
///     inc: the handover.
///     memfd: the file.
///     most: the number of places to list for each condition.
///
/// Returns: a dict. `duplicated`, `beyond`, `interior` and `nowhere` are (number of folios, [(place in the file in
/// pages, phys)] of the first ones); `listed` has the number of folios that the list holds.
#[pyfunction]
#[pyo3(signature = (inc, memfd, most = 16))]
pub(crate) fn check_memfd_folios<'py>(
    py: Python<'py>,
    inc: &PyIncoming,
    memfd: &PyMemfd,
    most: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let checks = py.detach(|| check_memfd(&memfd.inner, inc.inner.preserved(), most));
    let dict = PyDict::new(py);
    let all = [
        ("duplicated", checks.duplicated),
        ("beyond", checks.beyond),
        ("interior", checks.interior),
        ("nowhere", checks.nowhere),
        ("listed", (Vec::new(), memfd.inner.folios.len() as u64)),
    ];
    for (name, (spots, count)) in all {
        let spots: Vec<_> = spots.iter().map(|(index, phys)| (*index, phys.0)).collect();
        dict.set_item(name, (count, spots))?;
    }
    Ok(dict)
}

/// The memory of a claim: a range of bytes, a vmalloc area, or a file.
#[derive(FromPyObject)]
pub(crate) enum Claimed<'py> {
    Range((u64, u64)),
    Area(Bound<'py, PyVmalloc>),
    File(Bound<'py, PyMemfd>),
}

/// The names that rows refer to by number: (owner, what).
type Names = Arc<Vec<(String, String)>>;

const UNCLAIMED: (&str, &str) = ("unknown", "preserved, but no payload refers to it");
const REST: &str = "rest of a folio of the pages before";

/// Ranges of pages with their owners, by address: a sequence of `OwnedRange`, each made on access.
#[pyclass(frozen, sequence, module = "kho", name = "OwnerRows")]
pub(crate) struct OwnerRows {
    rows: Arc<Vec<Row>>,
    /// The indices of the rows to show; `None` for all.
    picked: Option<Vec<u32>>,
    names: Names,
    page: PageSize,
}
crate::assert_object_alignment!(OwnerRows);

#[pymethods]
impl OwnerRows {
    fn __len__(&self) -> usize {
        self.picked.as_ref().map_or(self.rows.len(), Vec::len)
    }

    fn __getitem__<'py>(&self, py: Python<'py>, at: isize) -> PyResult<Bound<'py, PyAny>> {
        static CLASS: PyOnceLock<Py<PyType>> = PyOnceLock::new();
        let index = if at < 0 { at + self.__len__().cast_signed() } else { at };
        let index = usize::try_from(index).ok().and_then(|index| match &self.picked {
            Some(picked) => picked.get(index).map(|index| *index as usize),
            None => Some(index),
        });
        let row = index.and_then(|index| self.rows.get(index));
        let row = row.ok_or_else(|| PyIndexError::new_err(format!("row {at} of {}", self.__len__())))?;
        let orders = PyTuple::new(py, orders_of(row.orders).map(|order| order.get()).collect::<Vec<_>>())?;
        let name = row.owner.and_then(|owner| self.names.get(usize::try_from(owner).ok()?));
        let (owner, what) = name.map_or(UNCLAIMED, |(owner, what)| (owner.as_str(), what.as_str()));
        let what = if row.rest { REST } else { what };
        let nbytes = u128::from(row.pages) << self.page.shift();
        CLASS.import(py, "kho._types", "OwnedRange")?.call1((row.phys.0, nbytes, orders, owner, what, row.offset()))
    }
}

/// Join the memory that is claimed with the memory that is preserved, for `kho.owners`.
///
/// Args:
///     inc: the handover.
///     names: (owner, what) each.
///     claims: (index of a name, index of the name for the list of an area, memory) each; memory is (phys, nbytes), a
///         `Vmalloc` or a `Memfd`.
///
/// Returns: a dict of `rows`, `unowned`, `unpreserved` (`OwnerRows`), `shared` ([(phys, nbytes, name, name)]), `totals`
/// (bytes by name), `unowned_bytes`, and `more_unpreserved` and `more_shared`, the numbers of those that are not
/// listed.
///
/// Raises: ParameterError for an index without a name.
#[pyfunction]
pub(crate) fn join_owners<'py>(
    py: Python<'py>,
    inc: &PyIncoming,
    names: Vec<(String, String)>,
    claims: Vec<(u32, u32, Claimed<'py>)>,
) -> PyResult<Bound<'py, PyDict>> {
    let preserved = inc.inner.preserved();
    let page = preserved.geometry().page();
    let mut all = Claims::default();
    for (owner, list, memory) in &claims {
        if usize::try_from(*owner.max(list)).is_ok_and(|most| most >= names.len()) {
            return Err(to_py(Error::Invalid {
                what: "claims",
                why: format!("name {} is not there", owner.max(list)),
            }));
        }
        match memory {
            Claimed::Range((phys, nbytes)) => all.range(*owner, Phys(*phys), *nbytes, None),
            Claimed::Area(area) => all.vmalloc(*owner, *list, &area.get().inner),
            Claimed::File(file) => all.memfd(*owner, &file.get().inner, preserved),
        }
    }
    let most = usize::try_from(inc.inner.memory().room().items()).unwrap_or(usize::MAX);
    let (Owners { rows, unpreserved, shared, more }, unowned, (owned, nobodys)) = py.detach(|| {
        let found = join(preserved, all, most);
        let unowned: Vec<u32> =
            (0u32..).zip(&found.rows).filter(|(_, row)| row.owner.is_none()).map(|(at, _)| at).collect();
        let totals = totals(&found.rows, names.len());
        (found, unowned, totals)
    });
    let names: Names = Arc::new(names);
    let as_rows = |rows, picked| Py::new(py, OwnerRows { rows, picked, names: Arc::clone(&names), page });
    let rows = Arc::new(rows);
    let dict = PyDict::new(py);
    dict.set_item("rows", as_rows(Arc::clone(&rows), None)?)?;
    dict.set_item("unowned", as_rows(rows, Some(unowned))?)?;
    dict.set_item("unpreserved", as_rows(Arc::new(unpreserved), None)?)?;
    dict.set_item("more_unpreserved", more.unpreserved)?;
    dict.set_item("more_shared", more.shared)?;
    let shared: Vec<_> = shared.iter().map(|s| (s.phys.0, s.len, s.owners.0, s.owners.1)).collect();
    dict.set_item("shared", shared)?;
    let bytes: Vec<u128> = owned.iter().map(|pages| pages << page.shift()).collect();
    dict.set_item("totals", bytes)?;
    dict.set_item("unowned_bytes", nobodys << page.shift())?;
    Ok(dict)
}

/// (phys, version) of each, for Python.
fn unlisted(found: &[Unlisted]) -> Vec<(u64, u32)> {
    let version = |memfd: &Unlisted| match memfd.version {
        MemfdVersion::V1 => 1,
        MemfdVersion::V2 => 2,
    };
    found.iter().map(|memfd| (memfd.phys.0, version(memfd))).collect()
}

/// Find the memfds whose structure lies in preserved pages without an owner.
///
/// Args:
///     inc: the handover.
///     unowned: the pages, as `join_owners` returns them.
///
/// Returns: (physical address of the structure, version) each, ascending.
///
/// Raises: SourceError on a read error.
///
/// Source: abi.md section 6.
#[pyfunction]
pub(crate) fn find_unlisted(py: Python<'_>, inc: &PyIncoming, unowned: &OwnerRows) -> PyResult<Vec<(u64, u32)>> {
    let found = reading(py, || {
        let picked = unowned.picked.iter().flatten().filter_map(|at| unowned.rows.get(*at as usize));
        let len = |row: &Row| u64::try_from(u128::from(row.pages) << unowned.page.shift()).unwrap_or(u64::MAX);
        let ranges: Vec<PhysRange> = picked.map(|row| PhysRange { start: row.phys, len: len(row) }).collect();
        inc.inner.unlisted_memfds(&ranges)
    })?;
    Ok(unlisted(&found.or_raise()?))
}

/// Find the memfds whose structure lies in memory that the map does not preserve.
///
/// Args: inc: the handover.
///
/// Returns: as `find_unlisted`; empty if the memory was not searched, and without the root FDT of a handover whose map
/// was given back.
///
/// Source: abi.md section 6.
#[pyfunction]
pub(crate) fn find_outside_map(py: Python<'_>, inc: &PyIncoming) -> PyResult<Vec<(u64, u32)>> {
    Ok(unlisted(&reading(py, || inc.inner.memfds_outside_map())?))
}
