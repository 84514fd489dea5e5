//! Devicetrees: `Fdt`, `FdtNode`, `FdtWriter`, and the placeholders and `with` blocks of the writer.

#![forbid(unsafe_code)]

use crate::args::copied;
use crate::errors::{OrRaise, to_py};
use kho::error::{Error, FdtProblem};
use kho::fdt::{Fdt, FdtWriter, Node, Placeholder, totalsize};
use pyo3::buffer::PyBuffer;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyMemoryView, PySlice};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes in a header.
const HEADER: u32 = 40;

/// Copies as many bytes as the blob's header names: the buffer may be all of a machine's memory.
fn copy_blob(blob: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    let py = blob.py();
    let buffer = PyBuffer::<u8>::get(blob)?;
    if buffer.dimensions() != 1 {
        return copied(py, &buffer);
    }
    let view = PyMemoryView::from(blob)?;
    let head = |n: u32| -> PyResult<Vec<u8>> {
        let slice = view.get_item(PySlice::new(py, 0, n as isize, 1))?;
        copied(py, &PyBuffer::get(&slice)?)
    };
    let header = head(HEADER)?;
    match totalsize(&header) {
        Some(total) if total > HEADER => head(total),
        _ => Ok(header),
    }
}

/// A flattened devicetree, read from a buffer of bytes (Devicetree Specification 0.4, chapter 5).
///
/// `fdt["/data"]` is the node at a path (NotFoundError without it), `"/data" in fdt` says whether there is one, and
/// `bytes(fdt)` is the blob.
///
/// Args:
///     blob: the bytes; those after the header's `totalsize` are neither read nor kept.
///
/// Raises: FdtError with the offset of the first thing that is wrong.
#[pyclass(frozen, module = "kho.fdt", name = "Fdt")]
pub(crate) struct PyFdt(Arc<Fdt>);
crate::assert_object_alignment!(PyFdt);

impl PyFdt {
    /// Parses a blob.
    pub(crate) fn of(blob: &[u8]) -> PyResult<Self> {
        Ok(PyFdt(Arc::new(Fdt::parse(blob).or_raise()?)))
    }

    /// The devicetree.
    pub(crate) fn inner(&self) -> &Fdt {
        &self.0
    }
}

#[pymethods]
impl PyFdt {
    #[new]
    fn new(py: Python<'_>, blob: &Bound<'_, PyAny>) -> PyResult<Self> {
        let bytes = copy_blob(blob)?;
        let fdt = py.detach(|| Fdt::parse(&bytes)).or_raise()?;
        Ok(PyFdt(Arc::new(fdt)))
    }

    /// Read as much of a blob as can be read.
    ///
    /// Nodes and properties are given in order, up to where the blob is damaged. Properties whose names are cut off are
    /// in `FdtNode.raw_properties`: Linux 6.19 and later show `out/fdt` in debugfs without the strings.
    ///
    /// Returns: the tree, and the FdtError that `Fdt(blob)` would raise; None if the blob is whole.
    ///
    /// Raises: FdtError if it does not begin with the header of a devicetree (length, magic, version).
    #[staticmethod]
    fn partial(py: Python<'_>, blob: &Bound<'_, PyAny>) -> PyResult<(Self, Option<Py<PyAny>>)> {
        let bytes = copy_blob(blob)?;
        let (fdt, problem) = py.detach(|| Fdt::parse_partial(&bytes)).or_raise()?;
        let problem = problem.map(|problem| to_py(problem).into_value(py).into_any());
        Ok((PyFdt(Arc::new(fdt)), problem))
    }

    /// The node `/`.
    ///
    /// Raises: NotFoundError if a partial read ended before it.
    #[getter]
    fn root(&self) -> PyResult<PyFdtNode> {
        self.0.root().or_raise().map(|node| self.wrap(node))
    }

    /// Bytes according to the header; more than `len(bytes(fdt))` if the blob is truncated.
    #[getter]
    fn totalsize(&self) -> u32 {
        self.0.totalsize()
    }

    /// The version of the format: 17, or 16 for old blobs.
    #[getter]
    fn version(&self) -> u32 {
        self.0.version()
    }

    /// The header's `boot_cpuid_phys`: the physical ID of the boot CPU.
    #[getter]
    fn boot_cpuid(&self) -> u32 {
        self.0.boot_cpuid()
    }

    /// The memory reservation map, as (address, nbytes); empty in a handover.
    #[getter]
    fn reservations(&self) -> Vec<(u64, u64)> {
        self.0.reservations().to_vec()
    }

    /// List every node, parents before children, in the order of the blob.
    fn walk(&self) -> Vec<PyFdtNode> {
        self.0.nodes().map(|node| self.wrap(node)).collect()
    }

    fn __getitem__(&self, path: &str) -> PyResult<PyFdtNode> {
        self.0.node(path).or_raise().map(|node| self.wrap(node))
    }

    fn __contains__(&self, path: &str) -> bool {
        self.0.node(path).is_ok()
    }

    fn __bytes__<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, self.0.as_bytes())
    }

    fn __repr__(&self) -> String {
        let (nodes, bytes) = (self.0.nodes().len(), self.0.totalsize());
        format!("<Fdt of {bytes} bytes, {nodes} nodes>")
    }
}

impl PyFdt {
    fn wrap(&self, node: Node<'_>) -> PyFdtNode {
        PyFdtNode { fdt: self.0.clone(), index: node.index() }
    }
}

/// A node of an `Fdt`; it keeps the tree alive.
///
/// `node["reg"]` is the value of a property as bytes (NotFoundError without it), and `"reg" in node` says whether there
/// is one. A node is equal to the same node of the same tree only, and hashable.
#[pyclass(frozen, module = "kho.fdt", name = "FdtNode")]
pub(crate) struct PyFdtNode {
    fdt: Arc<Fdt>,
    index: u32,
}
crate::assert_object_alignment!(PyFdtNode);

impl PyFdtNode {
    fn get(&self) -> PyResult<Node<'_>> {
        let gone = || Error::Fdt { offset: 0, problem: FdtProblem::NoNode { path: self.index.to_string() } };
        self.fdt.node_at(self.index).ok_or_else(gone).or_raise()
    }

    fn wrap(&self, node: Node<'_>) -> PyFdtNode {
        PyFdtNode { fdt: self.fdt.clone(), index: node.index() }
    }

    fn missing(&self, node: Node<'_>, problem: FdtProblem) -> PyErr {
        to_py(Error::Fdt { offset: u64::from(node.offset()), problem })
    }
}

#[pymethods]
impl PyFdtNode {
    /// The name of the node; empty for the root.
    ///
    /// U+FFFD stands for what is unprintable in a name that a partial read accepted.
    #[getter]
    fn name(&self) -> PyResult<&str> {
        Ok(self.get()?.name())
    }

    /// The path of the node, as "/data".
    #[getter]
    fn path(&self) -> PyResult<String> {
        Ok(self.get()?.path())
    }

    /// Offset of the node's token in the blob, in bytes.
    #[getter]
    fn offset(&self) -> PyResult<u32> {
        Ok(self.get()?.offset())
    }

    /// The parent; None for the root.
    #[getter]
    fn parent(&self) -> PyResult<Option<PyFdtNode>> {
        Ok(self.get()?.parent().map(|node| self.wrap(node)))
    }

    /// The children, in the order of the blob.
    #[getter]
    fn children(&self) -> PyResult<Vec<PyFdtNode>> {
        let children = self.get()?.children();
        Ok(children.map(|node| self.wrap(node)).collect())
    }

    /// The properties by name, in order; of two with one name the first, which is what libfdt reads.
    #[getter]
    fn properties<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        // Of several properties with one name libfdt reads the first.
        for property in self.get()?.properties() {
            if let Some(name) = property.name
                && !dict.contains(name)?
            {
                dict.set_item(name, PyBytes::new(py, property.value))?;
            }
        }
        Ok(dict)
    }

    /// Every property in order, as (name, offset of the name in the strings block, value).
    ///
    /// The name is None where the strings block does not hold it.
    #[getter]
    fn raw_properties<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        self.some_properties(py, 0, usize::MAX)
    }

    /// Give at most `most` of `raw_properties`, from number `first` on.
    fn some_properties<'py>(&self, py: Python<'py>, first: usize, most: usize) -> PyResult<Bound<'py, PyList>> {
        let list = PyList::empty(py);
        for p in self.get()?.properties().skip(first).take(most) {
            list.append((p.name, p.name_offset, PyBytes::new(py, p.value)))?;
        }
        Ok(list)
    }

    /// Read a property of 4 bytes, in native byte order.
    ///
    /// Raises: NotFoundError; FdtError for another length.
    fn u32(&self, name: &str) -> PyResult<u32> {
        self.get()?.u32(name).or_raise()
    }

    /// Read a property of 8 bytes, in native byte order.
    ///
    /// Raises: NotFoundError; FdtError for another length.
    fn u64(&self, name: &str) -> PyResult<u64> {
        self.get()?.u64(name).or_raise()
    }

    /// Read a property that is one NUL-terminated string, and leave its NUL out.
    ///
    /// Raises: NotFoundError; FdtError if it is not exactly one string in UTF-8.
    fn str(&self, name: &str) -> PyResult<&str> {
        self.get()?.str(name).or_raise()
    }

    /// Read a property that is a sequence of NUL-terminated strings.
    ///
    /// Raises: NotFoundError; FdtError if the last string has no NUL, or one is not UTF-8.
    fn strings(&self, name: &str) -> PyResult<Vec<&str>> {
        self.get()?.strings(name).or_raise()
    }

    /// Find the first child of exactly this name.
    ///
    /// Raises: NotFoundError.
    fn node(&self, name: &str) -> PyResult<PyFdtNode> {
        let node = self.get()?;
        match node.child(name) {
            Some(child) => Ok(self.wrap(child)),
            None => {
                let parent = node.path();
                let path = format!("{}/{name}", parent.trim_end_matches('/'));
                Err(self.missing(node, FdtProblem::NoNode { path }))
            }
        }
    }

    fn __getitem__<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let node = self.get()?;
        match node.prop(name) {
            Some(value) => Ok(PyBytes::new(py, value)),
            None => {
                let property = name.to_owned();
                Err(self.missing(node, FdtProblem::NoProperty { property }))
            }
        }
    }

    fn __contains__(&self, name: &str) -> PyResult<bool> {
        Ok(self.get()?.prop(name).is_some())
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<PyFdtNode>().is_ok_and(|other| {
            let other = other.get();
            Arc::ptr_eq(&self.fdt, &other.fdt) && self.index == other.index
        })
    }

    fn __hash__(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (Arc::as_ptr(&self.fdt) as usize, self.index).hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self) -> PyResult<String> {
        let node = self.get()?;
        let count = node.properties().len();
        Ok(format!("<FdtNode {:?}, {count} properties>", node.path()))
    }
}

/// A writer of devicetrees, equal to libfdt's sequential writer byte for byte.
///
/// Properties go before subnodes, since no reader looks for them after those.
///
/// Args:
///     capacity: bytes that the blob may take; the root FDT of a handover has one page.
///
/// Raises: from every method FdtError if it is called out of order, or if `capacity` does not suffice; then nothing has
/// changed.
///
/// Source: scripts/dtc/libfdt/fdt_sw.c.
#[pyclass(frozen, module = "kho.fdt", name = "FdtWriter")]
pub(crate) struct PyFdtWriter {
    capacity: usize,
    /// `None` once finished.
    state: Mutex<Option<FdtWriter>>,
}
crate::assert_object_alignment!(PyFdtWriter);

impl PyFdtWriter {
    fn lock(&self) -> MutexGuard<'_, Option<FdtWriter>> {
        // Poison is ignored: a call that fails changes nothing, so the state is consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, call: impl FnOnce(&mut FdtWriter) -> kho::Result<T>) -> PyResult<T> {
        // The lock is released at the end of this statement: no Python code runs while it is held.
        let result = match self.lock().as_mut() {
            Some(writer) => call(writer),
            None => Err(bad_state("the writer is finished")),
        };
        result.or_raise()
    }
}

fn bad_state(why: &'static str) -> Error {
    Error::Fdt { offset: 0, problem: FdtProblem::BadState { why } }
}

#[pymethods]
impl PyFdtWriter {
    #[new]
    #[pyo3(signature = (capacity = 4096))]
    fn new(capacity: usize) -> Self {
        PyFdtWriter { capacity, state: Mutex::new(Some(FdtWriter::new(capacity))) }
    }

    /// Bytes that the blob may take.
    #[getter]
    fn capacity(&self) -> usize {
        self.capacity
    }

    /// Add a range to the memory reservation map, before the root node begins.
    ///
    /// Args:
    ///     address: physical address of the range.
    ///     size: bytes.
    ///
    /// Raises: FdtError, OverflowError.
    fn add_reservemap_entry(&self, address: u64, size: u64) -> PyResult<()> {
        self.with(|w| w.add_reservemap_entry(address, size))
    }

    /// Begin a node: the root, which has no name, or a child of the open node; at most 64 deep.
    ///
    /// Raises: FdtError.
    #[pyo3(signature = (name = ""))]
    fn begin_node(&self, name: &str) -> PyResult<()> {
        self.with(|w| w.begin_node(name))
    }

    /// End the open node.
    ///
    /// Raises: FdtError if no node is open.
    fn end_node(&self) -> PyResult<()> {
        self.with(FdtWriter::end_node)
    }

    /// Give a context manager for a node: `with writer.node(name):` begins the node and ends it.
    ///
    /// Raises: FdtError on entering or leaving it.
    #[pyo3(signature = (name = ""))]
    fn node(slf: Bound<'_, Self>, name: &str) -> NodeBlock {
        NodeBlock { writer: slf.unbind(), name: name.to_owned(), depth: Mutex::new(None) }
    }

    /// Add a property to the open node.
    ///
    /// Args:
    ///     name: of the property.
    ///     value: a buffer of bytes.
    ///
    /// Raises: FdtError.
    fn property(&self, py: Python<'_>, name: &str, value: PyBuffer<u8>) -> PyResult<()> {
        let value = copied(py, &value)?;
        self.with(|w| w.property(name, &value))
    }

    /// Add a property of 4 bytes, in native byte order.
    ///
    /// Raises: FdtError, OverflowError.
    fn property_u32(&self, name: &str, value: u32) -> PyResult<()> {
        self.with(|w| w.property_u32(name, value))
    }

    /// Add a property of 8 bytes, in native byte order.
    ///
    /// Raises: FdtError, OverflowError.
    fn property_u64(&self, name: &str, value: u64) -> PyResult<()> {
        self.with(|w| w.property_u64(name, value))
    }

    /// Add a property that is a string and its NUL.
    ///
    /// Raises: FdtError.
    fn property_str(&self, name: &str, text: &str) -> PyResult<()> {
        self.with(|w| w.property_str(name, text))
    }

    /// Add a property of `length` zero bytes, to be filled before `finish`.
    ///
    /// Raises: FdtError.
    fn placeholder(slf: Bound<'_, Self>, name: &str, length: usize) -> PyResult<PyFdtPlaceholder> {
        let place = slf.get().with(|w| w.placeholder(name, length))?;
        let writer = slf.unbind();
        Ok(PyFdtPlaceholder { writer, place })
    }

    /// Give the blob, and close the writer.
    ///
    /// Raises: FdtError while a node is open, before the root, and if the writer has finished.
    fn finish<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let blob = {
            let mut state = self.lock();
            let blob = match state.as_ref() {
                Some(writer) => writer.to_blob(),
                None => Err(bad_state("the writer is finished")),
            };
            if blob.is_ok() {
                *state = None;
            }
            blob
        };
        Ok(PyBytes::new(py, &blob.or_raise()?))
    }
}

/// A property whose value is given later, made by `FdtWriter.placeholder`.
#[pyclass(frozen, module = "kho.fdt", name = "FdtPlaceholder")]
pub(crate) struct PyFdtPlaceholder {
    writer: Py<PyFdtWriter>,
    place: Placeholder,
}
crate::assert_object_alignment!(PyFdtPlaceholder);

#[pymethods]
impl PyFdtPlaceholder {
    /// Give the value; it can be given again until the writer finishes.
    ///
    /// Raises: FdtError for another length than was reserved, and once the writer has finished.
    fn fill(&self, py: Python<'_>, value: PyBuffer<u8>) -> PyResult<()> {
        let value = copied(py, &value)?;
        self.writer.get().with(|w| w.fill(self.place, &value))
    }

    /// Give a value of 8 bytes, in native byte order.
    ///
    /// Raises: FdtError as `fill`; OverflowError.
    fn fill_u64(&self, value: u64) -> PyResult<()> {
        let value = value.to_le_bytes();
        self.writer.get().with(|w| w.fill(self.place, &value))
    }
}

/// The context manager that `FdtWriter.node` returns: entering begins the node, leaving ends it.
///
/// Raises: FdtError on leaving if the nodes begun and ended in the block do not match.
#[pyclass(frozen, module = "kho.fdt", name = "FdtNodeBlock")]
pub(crate) struct NodeBlock {
    writer: Py<PyFdtWriter>,
    name: String,
    depth: Mutex<Option<usize>>,
}
crate::assert_object_alignment!(NodeBlock);

#[pymethods]
impl NodeBlock {
    fn __enter__(&self, py: Python<'_>) -> PyResult<Py<PyFdtWriter>> {
        let inside = self.writer.get().with(|w| {
            w.begin_node(&self.name)?;
            Ok(w.depth())
        })?;
        *self.depth.lock().unwrap_or_else(PoisonError::into_inner) = Some(inside);
        Ok(self.writer.clone_ref(py))
    }

    /// Ends the node. If the block raised, that exception is kept, and an error of ending the node is dropped.
    fn __exit__(
        &self,
        kind: &Bound<'_, PyAny>,
        _value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        let inside = self.depth.lock().unwrap_or_else(PoisonError::into_inner).take();
        let ended = self.writer.get().with(|w| {
            if inside != Some(w.depth()) {
                return Err(bad_state("nodes begun and ended in a block do not match"));
            }
            w.end_node()
        });
        match ended {
            Err(error) if kind.is_none() => Err(error),
            _ => Ok(false),
        }
    }
}
