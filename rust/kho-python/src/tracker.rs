//! `kho.Tracker`: a set of (pfn, order), in Python.

#![forbid(unsafe_code)]

use crate::args::{Number, Numbers, OrderArg, bytes};
use crate::errors::OrRaise;
use crate::folios::{FolioArray, PfnArray, RunArray};
use crate::shared::{Shared, Whole};
use kho::tracker::{Geometry, Orders, RoaringBits, Tracker, Words};
use kho::units::{Order, PageSize, Pfn};
use kho::{Error, Result};
use pyo3::exceptions::{PyIndexError, PyOverflowError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple, PyType};
use std::ptr;
use std::sync::{Mutex, PoisonError};
use std::vec;

/// The set of folios to preserve, (pfn, order) pairs in sparse bitmaps per order.
///
/// One bit is one pair; folios of different orders may overlap, since nothing in the format forbids it. Operations
/// return what changed. Bitmaps that become empty stay allocated until `clear`, as in the kernel.
///
/// `(pfn, order) in tracker` looks a folio up, and `pfn in tracker` one of order 0; `len` counts folios, and iteration
/// yields (pfn, order) of a snapshot in the order of serialization: by order, then pfn. As with sets, `<=` and `<` mean
/// subset; `|`, `&`, `-` and `^` make a new tracker, which has the left operand's bitmap size and no empty bitmaps, and
/// raise ParameterError if the page sizes differ. Trackers can be copied and pickled.
///
/// Threads may share trackers. Long calls (bulk operations, set algebra, lists, bitmaps) release the interpreter, so
/// that threads that work on different trackers run concurrently; those that work on one tracker run one after another,
/// except that bulk calls of one order run concurrently with those of other orders. A buffer that another thread writes
/// during a call is safe: its integers are copied a few at a time, and the copies are checked and used.
///
/// Args:
///     page_size: 4096, 16384 or 65536.
///     bitmap_bytes: 512 (Linux 6.16 and 6.17) or the page size (6.18 and later, the default).
///
/// Raises: ParameterError for another page size or bitmap size.
///
/// Source: struct kho_mem_track of kernel/kexec_handover.c; abi.md section 3.
#[pyclass(frozen, module = "kho", name = "Tracker")]
pub(crate) struct PyTracker {
    /// On the heap: a tracker's directories are aligned to 32 bytes, and CPython aligns objects to 16.
    shared: Box<Shared>,
}
crate::assert_object_alignment!(PyTracker);

/// A list of at least this many folios takes its order out of the tracker: other threads can use the other orders.
const LONG: usize = 4096;

impl PyTracker {
    pub(crate) fn from_tracker(tracker: Tracker) -> Self {
        PyTracker { shared: Box::new(Shared::new(tracker)) }
    }

    /// Runs `f` on the tracker, detached from the interpreter.
    pub(crate) fn read<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&Tracker) -> R + Send) -> R {
        self.long(py, |tracker| f(tracker))
    }

    /// A short operation: attached to the interpreter, unless another thread holds any of the tracker.
    fn quick<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Tracker) -> R + Send) -> R {
        match self.shared.try_whole() {
            Some(mut tracker) => f(&mut tracker),
            None => self.long(py, f),
        }
    }

    /// A long operation: detached from the interpreter.
    fn long<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut Tracker) -> R + Send) -> R {
        py.detach(|| f(&mut self.shared.whole()))
    }

    /// A long operation on folios of one order: detached, and concurrently with operations on other orders.
    fn of_order<R: Send>(&self, py: Python<'_>, order: Order, f: impl FnOnce(&mut Tracker) -> R + Send) -> R {
        py.detach(|| f(&mut self.shared.order(order)))
    }

    /// An operation on a list of folios.
    fn many<R: Send>(
        &self,
        py: Python<'_>,
        pfns: &Numbers,
        orders: Orders<'_>,
        f: impl FnOnce(&mut Tracker) -> R + Send,
    ) -> R {
        match orders {
            Orders::One(order) if pfns.len() >= LONG => self.of_order(py, order, f),
            _ => self.long(py, f),
        }
    }

    /// Runs `f` on two trackers, which may be the same, detached from the interpreter.
    fn both<R: Send>(&self, other: &PyTracker, py: Python<'_>, f: impl FnOnce(&Tracker, &Tracker) -> R + Send) -> R {
        py.detach(|| match lock_both(&self.shared, &other.shared) {
            (mine, Some(theirs)) => f(&mine, &theirs),
            (mine, None) => f(&mine, &mine),
        })
    }

    /// Combines another tracker into this one, detached from the interpreter. `itself`: whether a tracker that is
    /// combined with itself stays as it is (`|=`, `&=`), or becomes empty (`-=`, `^=`).
    fn change(
        &self,
        other: &PyTracker,
        py: Python<'_>,
        itself: bool,
        f: impl FnOnce(&mut Tracker, &Tracker) -> Result<()> + Send,
    ) -> PyResult<()> {
        let change = || match lock_both(&self.shared, &other.shared) {
            (mut mine, Some(theirs)) => f(&mut mine, &theirs),
            (_, None) if itself => Ok(()),
            (mut mine, None) => {
                let empty = Tracker::new(mine.geometry());
                mine.intersect_with(&empty).map(drop)
            }
        };
        py.detach(change).or_raise()
    }

    /// Makes a new tracker, on the heap, from both.
    fn combined(
        &self,
        other: &PyTracker,
        py: Python<'_>,
        op: impl FnOnce(&Tracker, &Tracker) -> Result<Tracker> + Send,
    ) -> PyResult<PyTracker> {
        self.both(other, py, op).map(Self::from_tracker).or_raise()
    }
}

/// Locks two trackers in the order of their addresses, so that no two threads wait for each other; one only once.
fn lock_both<'a>(mine: &'a Shared, theirs: &'a Shared) -> (Whole<'a>, Option<Whole<'a>>) {
    if ptr::eq(mine, theirs) {
        (mine.whole(), None)
    } else if ptr::from_ref(mine) < ptr::from_ref(theirs) {
        let mine = mine.whole();
        (mine, Some(theirs.whole()))
    } else {
        let theirs = theirs.whole();
        (mine.whole(), Some(theirs))
    }
}

fn roaring_bits(bits: u64) -> Result<RoaringBits> {
    match bits {
        32 => Ok(RoaringBits::B32),
        64 => Ok(RoaringBits::B64),
        _ => Err(Error::Invalid { what: "bits", why: format!("{bits} is neither 32 nor 64") }),
    }
}

fn order_of(order: Number) -> PyResult<Order> {
    Order::new(order.0).or_raise()
}

fn geometry(page_size: u64, bitmap_bytes: Option<u64>) -> Result<Geometry> {
    let page = PageSize::new(page_size)?;
    Geometry::new(page, bitmap_bytes.unwrap_or(page.bytes()))
}

#[pymethods]
impl PyTracker {
    #[new]
    #[pyo3(signature = (page_size = Number(4096), bitmap_bytes = None), text_signature = "(page_size=4096, bitmap_bytes=None)")]
    fn new(page_size: Number, bitmap_bytes: Option<Number>) -> PyResult<Self> {
        let geometry = geometry(page_size.0, bitmap_bytes.map(|n| n.0)).or_raise()?;
        Ok(Self::from_tracker(Tracker::new(geometry)))
    }

    /// Bytes in a page.
    #[getter]
    fn page_size(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.geometry().page().bytes())
    }

    /// Bytes in a bitmap: 512 (Linux 6.16 and 6.17) or the page size (6.18 and later).
    #[getter]
    fn bitmap_bytes(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.geometry().block_bytes())
    }

    /// Bytes of memory that the tracker takes: bitmaps and the directories that lead to them.
    #[getter]
    fn nbytes(&self, py: Python<'_>) -> u64 {
        self.quick(py, |t| t.nbytes())
    }

    /// Mark the folio at `pfn` for the next kernel (__kho_preserve_order).
    ///
    /// Args:
    ///     pfn: page frame number, a multiple of `1 << order`.
    ///     order: log2 of the number of pages, 0 to 36.
    ///
    /// Returns: True if it was not yet marked.
    ///
    /// Raises: MisalignedError, OrderError, OutOfRangeError.
    #[pyo3(signature = (pfn, order = Number(0)), text_signature = "($self, pfn, order=0)")]
    fn preserve(&self, py: Python<'_>, pfn: Number, order: Number) -> PyResult<bool> {
        let order = order_of(order)?;
        self.quick(py, |t| t.preserve(Pfn(pfn.0), order)).or_raise()
    }

    /// Unmark the folio at `pfn` (__kho_unpreserve_order).
    ///
    /// Args:
    ///     pfn: page frame number, a multiple of `1 << order`.
    ///     order: log2 of the number of pages, 0 to 36.
    ///
    /// Returns: True if it was marked.
    ///
    /// Raises: MisalignedError, OrderError, OutOfRangeError.
    #[pyo3(signature = (pfn, order = Number(0)), text_signature = "($self, pfn, order=0)")]
    fn unpreserve(&self, py: Python<'_>, pfn: Number, order: Number) -> PyResult<bool> {
        let order = order_of(order)?;
        self.quick(py, |t| t.unpreserve(Pfn(pfn.0), order)).or_raise()
    }

    /// Mark `n` pages from `pfn` on as the naturally aligned folios they split into (kho_preserve_pages).
    ///
    /// The split is greedy: each folio is as large as its alignment and the rest of the range allow. All or nothing.
    ///
    /// Returns: the number of these folios that were not yet marked.
    ///
    /// Raises: OutOfRangeError.
    fn preserve_pages(&self, py: Python<'_>, pfn: Number, n: Number) -> PyResult<u64> {
        self.quick(py, |t| t.preserve_pages(Pfn(pfn.0), n.0)).or_raise()
    }

    /// Unmark the folios that `preserve_pages` marks for the same range (kho_unpreserve_pages).
    ///
    /// Returns: the number of these folios that were marked.
    ///
    /// Raises: OutOfRangeError.
    fn unpreserve_pages(&self, py: Python<'_>, pfn: Number, n: Number) -> PyResult<u64> {
        self.quick(py, |t| t.unpreserve_pages(Pfn(pfn.0), n.0)).or_raise()
    }

    /// Mark `count` consecutive folios of one order from `pfn` on, all or nothing.
    ///
    /// Whole words of a bitmap are filled at a time, which is faster than `preserve_many`.
    ///
    /// Returns: the number of folios that were not yet marked.
    ///
    /// Raises: MisalignedError, OrderError, OutOfRangeError.
    fn preserve_run(&self, py: Python<'_>, pfn: Number, order: Number, count: Number) -> PyResult<u64> {
        let order = Order::new(order.0).or_raise()?;
        self.of_order(py, order, |t| t.preserve_run(Pfn(pfn.0), order, count.0)).or_raise()
    }

    /// Unmark `count` consecutive folios of one order from `pfn` on.
    ///
    /// Returns: the number of folios that were marked.
    ///
    /// Raises: MisalignedError, OrderError, OutOfRangeError.
    fn unpreserve_run(&self, py: Python<'_>, pfn: Number, order: Number, count: Number) -> PyResult<u64> {
        let order = Order::new(order.0).or_raise()?;
        self.of_order(py, order, |t| t.unpreserve_run(Pfn(pfn.0), order, count.0)).or_raise()
    }

    /// Mark many folios, all or nothing.
    ///
    /// Args:
    ///     pfns: a one-dimensional buffer of 64-bit or 32-bit integers, signed or not (numpy array, array.array,
    ///         memoryview, PfnArray), in any order. The buffer is not copied.
    ///     order: one order for all, or a buffer of integers of any width with one for each; bytes are fastest.
    ///
    /// Calls with one order run concurrently with those of other threads with other orders.
    ///
    /// Returns: the number of folios that were not yet marked.
    ///
    /// Raises: MisalignedError, OrderError, OutOfRangeError for the first folio that is wrong; ParameterError if the
    /// lengths differ; TypeError for other buffers.
    #[pyo3(signature = (pfns, order = None), text_signature = "($self, pfns, order=0)")]
    fn preserve_many(
        &self,
        py: Python<'_>,
        pfns: &Bound<'_, PyAny>,
        order: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let (pfns, orders) = (Numbers::new("pfns", pfns)?, OrderArg::new(order)?);
        self.many(py, &pfns, orders.orders(), |t| t.preserve_many(&pfns, orders.orders())).or_raise()
    }

    /// Unmark many folios, all or nothing.
    ///
    /// Args:
    ///     pfns: as of `preserve_many`.
    ///     order: as of `preserve_many`.
    ///
    /// Returns: the number of folios that were marked.
    ///
    /// Raises: as `preserve_many`.
    #[pyo3(signature = (pfns, order = None), text_signature = "($self, pfns, order=0)")]
    fn unpreserve_many(
        &self,
        py: Python<'_>,
        pfns: &Bound<'_, PyAny>,
        order: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let (pfns, orders) = (Numbers::new("pfns", pfns)?, OrderArg::new(order)?);
        self.many(py, &pfns, orders.orders(), |t| t.unpreserve_many(&pfns, orders.orders())).or_raise()
    }

    /// Look many folios up.
    ///
    /// Args:
    ///     pfns: as of `preserve_many`.
    ///     order: as of `preserve_many`.
    ///
    /// Returns: one byte for each folio, 1 if it is marked and else 0, also for a pfn that no folio of the order can
    /// have. `numpy.frombuffer(found, bool)` is a mask.
    ///
    /// Raises: OrderError; ParameterError if the lengths differ; TypeError for other buffers.
    #[pyo3(signature = (pfns, order = None), text_signature = "($self, pfns, order=0)")]
    fn contains_many<'py>(
        &self,
        py: Python<'py>,
        pfns: &Bound<'py, PyAny>,
        order: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (pfns, orders) = (Numbers::new("pfns", pfns)?, OrderArg::new(order)?);
        PyBytes::new_with(py, pfns.len(), |found| {
            self.many(py, &pfns, orders.orders(), |t| t.contains_many(&pfns, orders.orders(), found)).or_raise()
        })
    }

    fn __contains__(&self, item: &Bound<'_, PyAny>) -> PyResult<bool> {
        let (pfn, order) = match item.cast::<PyTuple>() {
            Ok(pair) if pair.len() == 2 => (pair.get_item(0)?, pair.get_item(1)?.extract()),
            _ => (item.clone(), Ok(Number(0))),
        };
        // A number that no folio can have is in no tracker; an object that is not a number raises TypeError.
        let (pfn, order) = match (pfn.extract::<Number>(), order) {
            (Ok(pfn), Ok(order)) => (pfn.0, order.0),
            (Err(e), _) | (_, Err(e)) => {
                let value = e.is_instance_of::<pyo3::exceptions::PyValueError>(item.py());
                return if value { Ok(false) } else { Err(e) };
            }
        };
        Ok(match Order::new(order) {
            Ok(order) => self.quick(item.py(), |t| t.contains(Pfn(pfn), order)),
            Err(_) => false,
        })
    }

    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(usize::try_from(self.quick(py, |t| t.len()))?)
    }

    fn __bool__(&self, py: Python<'_>) -> bool {
        self.quick(py, |t| !t.is_empty())
    }

    /// Iterates over (pfn, order) of a snapshot, in the order of serialization: by order, then pfn.
    fn __iter__(&self, py: Python<'_>) -> PyResult<TrackerIter> {
        let snapshot = self.long(py, |t| t.try_clone()).or_raise()?;
        Ok(TrackerIter {
            state: Mutex::new(IterState {
                rest: Some((Order::ZERO, Pfn(0))),
                batch: Vec::new().into_iter(),
                snapshot: Box::new(snapshot),
            }),
        })
    }

    /// List the runs of pages that folios of any order cover: (pfn, pages), ascending.
    ///
    /// The runs are disjoint, and no two are adjacent.
    ///
    /// Raises: OutOfMemoryError if this process cannot allocate the list.
    fn extents(&self, py: Python<'_>) -> PyResult<RunArray> {
        self.read(py, |t| RunArray::of(t.extents().map(|(start, end)| (start, end.0 - start.0)))).or_raise()
    }

    /// List the maximal runs of consecutive folios of one order: (pfn, folios), ascending.
    ///
    /// Raises: OrderError; OutOfMemoryError if this process cannot allocate the list.
    #[pyo3(signature = (order = Number(0)), text_signature = "($self, order=0)")]
    fn runs(&self, py: Python<'_>, order: Number) -> PyResult<RunArray> {
        let order = order_of(order)?;
        self.of_order(py, order, |t| RunArray::of(t.runs(order))).or_raise()
    }

    /// List every folio, by address, then order.
    ///
    /// Raises: OutOfMemoryError if this process cannot allocate the list.
    fn folios(&self, py: Python<'_>) -> PyResult<FolioArray> {
        self.read(py, FolioArray::of).or_raise()
    }

    /// List the pfns of the folios of one order, ascending.
    ///
    /// Raises: OrderError; OutOfMemoryError if this process cannot allocate the list.
    #[pyo3(signature = (order = Number(0)), text_signature = "($self, order=0)")]
    fn pfns(&self, py: Python<'_>, order: Number) -> PyResult<PfnArray> {
        let order = order_of(order)?;
        self.of_order(py, order, |t| PfnArray::of(t, order)).or_raise()
    }

    /// Count the folios of one order that begin below `pfn`.
    ///
    /// No folio needs to begin at `pfn`. The time is proportional to the bytes of that order's bitmaps below it.
    ///
    /// Raises: OrderError.
    #[pyo3(signature = (pfn, order = Number(0)), text_signature = "($self, pfn, order=0)")]
    fn rank(&self, py: Python<'_>, pfn: Number, order: Number) -> PyResult<u64> {
        let order = order_of(order)?;
        Ok(self.quick(py, |t| t.rank(Pfn(pfn.0), order)))
    }

    /// Find the pfn of the folio of one order that has `rank` others of that order below it.
    ///
    /// The time is as that of `Tracker.rank`.
    ///
    /// Raises: IndexError if there is none; OrderError.
    #[pyo3(signature = (rank, order = Number(0)), text_signature = "($self, rank, order=0)")]
    fn select(&self, py: Python<'_>, rank: &Bound<'_, PyAny>, order: Number) -> PyResult<u64> {
        let order = order_of(order)?;
        let pfn = match rank.extract::<u64>() {
            Ok(rank) => self.quick(py, |t| t.select(rank, order)),
            Err(error) if error.is_instance_of::<PyOverflowError>(py) => None,
            Err(error) => return Err(error),
        };
        let missing = || PyIndexError::new_err(format!("no folio of order {order} has {rank} others below it"));
        pfn.map(|pfn| pfn.0).ok_or_else(missing)
    }

    /// Give the folio numbers (`pfn >> order`) of one order as a Roaring bitmap in the portable format.
    ///
    /// Args:
    ///     order: log2 of the number of pages.
    ///     bits: 64 for BitMap64, RoaringTreemap and Roaring64Map; 32 for BitMap and RoaringBitmap.
    ///     runs: store a container as runs where that is shorter, as run_optimize does.
    ///
    /// Raises: OutOfRangeError for a number beyond 32 bits; OrderError; ParameterError for other `bits`.
    ///
    /// Source: the Roaring format specification, "Standard 32-bit Roaring Bitmap" and "Extension for 64-bit".
    #[pyo3(signature = (order = Number(0), *, bits = Number(64), runs = true), text_signature = "($self, order=0, *, bits=64, runs=True)")]
    fn to_roaring<'py>(
        &self,
        py: Python<'py>,
        order: Number,
        bits: Number,
        runs: bool,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let (order, bits) = (order_of(order)?, roaring_bits(bits.0).or_raise()?);
        let bytes = self.of_order(py, order, |t| t.to_roaring(order, bits, runs)).or_raise()?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Mark the folios of one order whose numbers (`pfn >> order`) a Roaring bitmap holds, all or nothing.
    ///
    /// Time and memory are bounded by the number of containers: at most eight bitmaps for each 14 bytes of data or so.
    ///
    /// Args:
    ///     data: a buffer of bytes, exactly one bitmap as `to_roaring` writes it.
    ///     order: log2 of the number of pages.
    ///     bits: 64 or 32, as for `to_roaring`.
    ///
    /// Returns: the number of folios that were not yet marked.
    ///
    /// Raises: ParameterError unless `data` is exactly one well-formed bitmap; OutOfRangeError; OrderError; TypeError
    /// for other buffers.
    #[pyo3(signature = (data, order = Number(0), *, bits = Number(64)), text_signature = "($self, data, order=0, *, bits=64)")]
    fn update_roaring(&self, py: Python<'_>, data: &Bound<'_, PyAny>, order: Number, bits: Number) -> PyResult<u64> {
        let (order, bits) = (order_of(order)?, roaring_bits(bits.0).or_raise()?);
        let data = bytes("data", data)?.ok_or_else(|| PyTypeError::new_err("data: a buffer of bytes is wanted"))?;
        self.of_order(py, order, |t| t.adopt_roaring(order, bits, &data)).or_raise()
    }

    /// Make a tracker from a Roaring bitmap.
    ///
    /// Args:
    ///     data: as of `update_roaring`.
    ///     order: log2 of the number of pages.
    ///     bits: 64 or 32, as for `to_roaring`.
    ///     page_size: as of `Tracker`.
    ///     bitmap_bytes: as of `Tracker`.
    ///
    /// Raises: as `update_roaring`; ParameterError as `Tracker`.
    #[staticmethod]
    #[pyo3(
        signature = (data, order = Number(0), *, bits = Number(64), page_size = Number(4096), bitmap_bytes = None),
        text_signature = "(data, order=0, *, bits=64, page_size=4096, bitmap_bytes=None)"
    )]
    fn from_roaring(
        py: Python<'_>,
        data: &Bound<'_, PyAny>,
        order: Number,
        bits: Number,
        page_size: Number,
        bitmap_bytes: Option<Number>,
    ) -> PyResult<Self> {
        let tracker = Self::new(page_size, bitmap_bytes)?;
        tracker.update_roaring(py, data, order, bits)?;
        Ok(tracker)
    }

    /// Unmark every folio and free the bitmaps.
    fn clear(&self, py: Python<'_>) {
        self.long(py, Tracker::clear);
    }

    /// Make a tracker with the same folios.
    ///
    /// Raises: OutOfMemoryError.
    fn copy(&self, py: Python<'_>) -> PyResult<PyTracker> {
        self.long(py, |t| t.try_clone()).map(Self::from_tracker).or_raise()
    }

    fn __copy__(&self, py: Python<'_>) -> PyResult<PyTracker> {
        self.copy(py)
    }

    fn __deepcopy__(&self, py: Python<'_>, _memo: &Bound<'_, PyAny>) -> PyResult<PyTracker> {
        self.copy(py)
    }

    /// Give what each order holds and costs.
    ///
    /// Returns: for each order that has bitmaps a dict of `folios`, `blocks` (bitmaps), `empty_blocks`, and `bytes`.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = PyDict::new(py);
        for row in self.quick(py, |t| t.stats()) {
            let entry = PyDict::new(py);
            entry.set_item("folios", row.folios)?;
            entry.set_item("blocks", row.blocks)?;
            entry.set_item("empty_blocks", row.empty_blocks)?;
            entry.set_item("bytes", row.bytes)?;
            stats.set_item(row.order.get(), entry)?;
        }
        Ok(stats)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> PyResult<Py<PyAny>> {
        let py = other.py();
        let Ok(other) = other.cast::<PyTracker>() else {
            return Ok(py.NotImplemented());
        };
        let equal = self.both(other.get(), py, |a, b| *a == *b);
        Ok(equal.into_pyobject(py)?.to_owned().into_any().unbind())
    }

    /// Whether `other` has every folio of this tracker, and at least one more.
    fn __lt__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, |a, b| a.len() < b.len() && a.is_subset(b))
    }

    fn __le__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.issubset(py, other)
    }

    fn __gt__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, |a, b| a.len() > b.len() && b.is_subset(a))
    }

    fn __ge__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.issuperset(py, other)
    }

    fn __or__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::union)
    }

    fn __and__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::intersection)
    }

    fn __sub__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::difference)
    }

    fn __xor__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<PyTracker> {
        self.combined(&other, py, Tracker::symmetric_difference)
    }

    fn __ior__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.change(&other, py, true, |a, b| a.union_with(b).map(drop))
    }

    fn __iand__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.change(&other, py, true, |a, b| a.intersect_with(b).map(drop))
    }

    fn __isub__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.change(&other, py, false, |a, b| a.subtract(b).map(drop))
    }

    fn __ixor__(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> PyResult<()> {
        self.change(&other, py, false, |a, b| a.symmetric_difference_with(b).map(drop))
    }

    /// Say whether no folio is in both trackers.
    fn isdisjoint(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, Tracker::is_disjoint)
    }

    /// Say whether `other` has every folio of this tracker.
    fn issubset(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, Tracker::is_subset)
    }

    /// Say whether this tracker has every folio of `other`.
    fn issuperset(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> bool {
        self.both(&other, py, |a, b| b.is_subset(a))
    }

    /// Count the folios of `self | other` without making it.
    ///
    /// Trackers of different page sizes have no folio in common.
    fn union_len(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> u64 {
        self.both(&other, py, Tracker::union_len)
    }

    /// Count the folios of `self & other` without making it.
    fn intersection_len(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> u64 {
        self.both(&other, py, Tracker::intersection_len)
    }

    /// Count the folios of `self - other` without making it.
    fn difference_len(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> u64 {
        self.both(&other, py, Tracker::difference_len)
    }

    /// Count the folios of `self ^ other` without making it.
    fn symmetric_difference_len(&self, py: Python<'_>, other: PyRef<'_, PyTracker>) -> u64 {
        self.both(&other, py, Tracker::symmetric_difference_len)
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        self.quick(py, |t| {
            format!(
                "<kho.Tracker of {} folios, page_size={}, bitmap_bytes={}>",
                t.len(),
                t.geometry().page().bytes(),
                t.geometry().block_bytes()
            )
        })
    }

    /// The constructor's arguments, and the bitmaps as bytes.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let py = slf.py();
        let (geometry, state) = slf.get().long(py, |t| (t.geometry(), t.to_bytes()));
        let args = (geometry.page().bytes(), geometry.block_bytes());
        Ok((slf.get_type(), args, PyBytes::new(py, &state)))
    }

    /// The second half of unpickling: fill an empty tracker. Raises ParameterError.
    fn __setstate__(&self, py: Python<'_>, state: &Bound<'_, PyBytes>) -> PyResult<()> {
        let state = state.as_bytes();
        self.long(py, |t| {
            if t.orders().next().is_some() {
                return Err(Error::Invalid { what: "tracker state", why: "the tracker is not new".to_owned() });
            }
            t.adopt_bytes(state).inspect_err(|_| t.clear())
        })
        .or_raise()
    }
}

type Reduced<'py> = (Bound<'py, PyType>, (u64, u64), Bound<'py, PyBytes>);

/// Iterates over a snapshot of a tracker.
#[pyclass(frozen, module = "kho._kho")]
pub(crate) struct TrackerIter {
    state: Mutex<IterState>,
}
crate::assert_object_alignment!(TrackerIter);

struct IterState {
    /// On the heap, as in a `PyTracker`.
    snapshot: Box<Tracker>,
    batch: vec::IntoIter<(Pfn, Order)>,
    /// The order and pfn from which the next batch is read; `None` at the end.
    rest: Option<(Order, Pfn)>,
}

/// Folios in a batch.
const BATCH: usize = 256;

impl IterState {
    fn next(&mut self) -> Option<(u64, u32)> {
        if self.batch.len() == 0 {
            let (order, from) = self.rest?;
            let batch: Vec<_> = self.snapshot.iter_from(order, from).take(BATCH).collect();
            self.rest = match batch.last() {
                Some(&(pfn, order)) => Some((order, Pfn(pfn.0 + 1))),
                None => {
                    self.snapshot.clear();
                    None
                }
            };
            self.batch = batch.into_iter();
        }
        self.batch.next().map(|(pfn, order)| (pfn.0, order.get()))
    }
}

#[pymethods]
impl TrackerIter {
    fn __iter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    fn __next__(&self) -> Option<(u64, u32)> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.next()
    }
}
