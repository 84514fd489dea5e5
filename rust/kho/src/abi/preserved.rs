//! What a preserved-memory map preserves, and bitmaps that are used in place instead of being copied.

#![forbid(unsafe_code)]

use crate::error::Result;
use crate::memory::PhysMemory;
use crate::tracker::{Bitmap, Geometry, Tracker};
use crate::units::{Order, Pfn, Phys};
use std::fmt;
use std::sync::{Arc, LazyLock, OnceLock};

/// The folios that a map preserves. Bitmaps used in place are counted when the tracker is first asked for, and never
/// copied.
pub struct Preserved {
    geometry: Geometry,
    tracker: LazyLock<Tracker, Box<dyn FnOnce() -> Tracker + Send>>,
    bitmaps: Bitmaps,
    /// The pages with bitmaps that are used where they are, once that is known.
    in_place: Arc<OnceLock<Vec<(Pfn, Pfn)>>>,
    outside: Option<(Phys, u64)>,
}

/// Makes a tracker of bitmaps, and says in which pages those lie that it has not copied.
type Count = Box<dyn FnOnce() -> (Tracker, Vec<(Pfn, Pfn)>) + Send>;

/// The bitmaps of a map that stay where they are.
#[derive(Clone, Debug, Default)]
pub struct Bitmaps {
    /// The number of bitmaps.
    pub count: u64,
    /// The pages they take: ascending, disjoint.
    pub pages: Vec<(Pfn, Pfn)>,
}

impl From<Tracker> for Preserved {
    fn from(tracker: Tracker) -> Self {
        let preserved =
            Self::in_place(tracker.geometry(), Bitmaps::default(), None, Box::new(move || (tracker, Vec::new())));
        preserved.tracker();
        preserved
    }
}

impl Preserved {
    /// What bitmaps say that stay where they are; `count` makes a tracker of them. `outside`: memory among it that one
    /// does not have.
    pub fn in_place(geometry: Geometry, bitmaps: Bitmaps, outside: Option<(Phys, u64)>, count: Count) -> Self {
        let in_place = Arc::new(OnceLock::new());
        let known = Arc::clone(&in_place);
        let count = move || {
            let (tracker, pages) = count();
            // Set by this alone, which runs once.
            let _ = known.set(pages);
            tracker
        };
        Preserved { geometry, tracker: LazyLock::new(Box::new(count)), bitmaps, in_place, outside }
    }

    /// The folios, counted now if they were not.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Page size and bitmap size of the map.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The first memory, and its bytes, that is preserved in an arena which does not have it.
    pub fn outside(&self) -> Option<(Phys, u64)> {
        self.outside
    }

    /// The bitmaps that were not copied when the map was read.
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// The pages with bitmaps that are, or may be, read where they are: ascending, disjoint.
    pub fn pages_in_place(&self) -> &[(Pfn, Pfn)] {
        self.in_place.get().unwrap_or(&self.bitmaps.pages)
    }
}

impl fmt::Debug for Preserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Preserved").field("geometry", &self.geometry).finish_non_exhaustive()
    }
}

/// Memory whose bitmaps can be used in place: an arena that is being taken over.
pub trait InPlace: PhysMemory {
    /// Starts to collect the bitmaps of a map that lies in this memory.
    fn collect(&self, geometry: Geometry) -> Box<dyn Collector + '_>;
}

/// Collects the bitmaps of one map.
pub trait Collector {
    /// Adds a bitmap that lies in the memory.
    ///
    /// # Errors
    /// [`Error::OutsideMemory`](crate::Error::OutsideMemory) if it does not lie there;
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if it names a folio beyond the address space.
    fn add(&mut self, bitmap: Bitmap) -> Result<()>;

    /// Adds a single folio, from a bitmap that several orders share.
    ///
    /// # Errors
    /// As [`Tracker::preserve`].
    fn preserve(&mut self, pfn: Pfn, order: Order) -> Result<()>;

    /// Returns what the map preserves.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for two bitmaps of the same folios.
    fn finish(self: Box<Self>) -> Result<Preserved>;
}
