//! The C twin is honest: what it writes is, byte for byte, what this library writes for the same folios.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use kho::Mapping;
use kho::Result;
use kho::abi::layout::BitmapSize;
use kho::abi::{Abi, chunk, radix};
use kho::memory::SliceMemory;
use kho::tracker::{BlockSource, Geometry, Tracker};
use kho::units::{Order, PageSize, Pfn, Phys};
use kho_benches::twin::{BEST, KERNEL, Machine, Twin, Version};
use kho_benches::workload::{Workload, shuffled};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

/// Pages at addresses that count up from where the twin's do.
struct Same {
    first: u64,
    blocks: Mutex<Vec<Box<[u64; 512]>>>,
}

impl Same {
    fn from(first: u64) -> Arc<Self> {
        Arc::new(Same { first, blocks: Mutex::default() })
    }
}

// SAFETY: a block is a box of its own, which lives as long as the source.
unsafe impl BlockSource for Same {
    fn alloc_block(&self, bytes: usize) -> Result<NonNull<u64>> {
        assert_eq!(bytes, 4096);
        let mut blocks = self.blocks.lock().unwrap();
        blocks.push(Box::new([0; 512]));
        Ok(NonNull::from(&mut **blocks.last_mut().unwrap()).cast())
    }

    fn is_shared(&self) -> bool {
        false
    }

    fn phys_of(&self, block: NonNull<u64>) -> Option<Phys> {
        let blocks = self.blocks.lock().unwrap();
        let at = blocks.iter().position(|words| words.as_ptr() == block.as_ptr())?;
        Some(Phys(self.first + 4096 * at as u64))
    }

    fn nbytes(&self) -> u64 {
        4096 * self.blocks.lock().unwrap().len() as u64
    }

    fn renewed(&self) -> Arc<dyn BlockSource> {
        Same::from(self.first)
    }
}

fn workloads() -> Vec<Workload> {
    let random = |n: u64, bits| (0..n).map(|n| shuffled(n, bits)).collect::<Vec<_>>();
    // Sparse over 2^45 pages: the tree of the twin's array is several levels high, and grows from both ends.
    let far = random(400, 45);
    let mixed: Vec<u64> = random(9000, 24).into_iter().map(|pfn| pfn & !0x3ff).collect();
    let orders = mixed.iter().enumerate().map(|(n, _)| [0, 9, 10, 3][n % 4]).collect();
    vec![
        Workload { name: "none", pfns: vec![], orders: None, span: 1 << 20 },
        Workload { name: "one", pfns: vec![0], orders: None, span: 1 << 20 },
        Workload { name: "dense", pfns: random(30_000, 17), orders: None, span: 1 << 20 },
        Workload { name: "many", pfns: random(20_000, 26), orders: None, span: 1 << 26 },
        Workload { name: "far", pfns: far, orders: None, span: 1 << 26 },
        Workload { name: "mixed", pfns: mixed, orders: Some(orders), span: 1 << 24 },
    ]
}

/// What is preserved, with half of it taken back.
fn filled(twin: &mut Twin, t: &mut Tracker, workload: &Workload) {
    twin.preserve_each(workload);
    for (pfn, order) in workload.folios() {
        t.preserve(pfn, order).unwrap();
    }
    let half = workload.len() / 2;
    let orders = workload.orders.as_ref().map(|orders| orders[..half].to_vec());
    let gone = Workload { name: "half", pfns: workload.pfns[..half].to_vec(), orders, span: workload.span };
    twin.unpreserve_each(&gone);
    for (pfn, order) in gone.folios() {
        t.unpreserve(pfn, order).unwrap();
    }
}

#[test]
fn the_chunk_list_of_the_twin_is_ours_byte_for_byte() {
    for build in [&KERNEL, &BEST] {
        for workload in workloads() {
            let mut twin = Twin::new(build, Version::V1, 8192);
            let (next, _) = twin.memory();
            let geometry = Geometry::paged(PageSize::Size4K);
            let mut t = Tracker::with_source(geometry, Same::from(next));
            filled(&mut twin, &mut t, &workload);
            let bitmaps: usize = t.orders().map(|order| t.blocks(order).count()).sum();
            let first = twin.serialize();
            let chunks_at = next + 4096 * bitmaps as u64;
            // As many pages as bitmaps are more than chunks need; none is zero before.
            let memory = Mapping::anonymous(4096 * (bitmaps as u64 + 1)).unwrap();
            assert!(memory.write(0, &vec![0xa5; 4096 * bitmaps]));
            let mut used = 0;
            let alloc = || {
                used += 4096;
                Ok((Phys(chunks_at + used - 4096), memory.items(used - 4096, 4096).unwrap()))
            };
            chunk::serialize(&t, alloc).unwrap();
            let mut chunks = vec![0; used as usize];
            assert!(memory.read(0, &mut chunks));
            let (start, bytes) = twin.memory();
            let page = |phys: u64| &bytes[(phys - start) as usize..][..4096];
            assert_eq!(first, if used > 0 { chunks_at } else { 0 }, "{}", workload.name);
            assert_eq!(bytes.len(), 4096 * bitmaps + chunks.len(), "{}", workload.name);
            for (phys, ours) in (chunks_at..).step_by(4096).zip(chunks.chunks(4096)) {
                assert!(page(phys) == ours, "{} at {phys:#x}", workload.name);
            }
            for order in t.orders() {
                for block in t.blocks(order) {
                    let mut ours = vec![0; 4096];
                    block.copy_to(&mut ours);
                    assert!(page(block.phys().unwrap().0) == ours, "{}", workload.name);
                }
            }
            // And our reader takes it.
            let memory = SliceMemory::new([(Phys(start), bytes)]).unwrap();
            let chunks = chunk::walk(&memory, PageSize::Size4K, Phys(first)).unwrap();
            let geometry = chunk::geometry(PageSize::Size4K, BitmapSize::Page).unwrap();
            chunk::check(&memory, geometry, &chunks).unwrap();
            assert_eq!(chunk::read(&memory, geometry, &chunks).unwrap(), t);
        }
    }
}

/// The pages of a tree in the order of a walk, with pointers replaced by the numbers of the nodes.
fn numbered(pages: &BTreeMap<u64, Vec<u8>>, root: u64, depth: u32, out: &mut Vec<Vec<u8>>) {
    let node = &pages[&root];
    if depth == 1 {
        return out.push(node.clone());
    }
    let at = out.len();
    out.push(Vec::new());
    let mut table = Vec::new();
    for entry in node.as_chunks::<8>().0 {
        match u64::from_le_bytes(*entry) {
            0 => table.extend([0; 8]),
            child => {
                table.extend(out.len().to_le_bytes());
                numbered(pages, child, depth - 1, out);
            }
        }
    }
    out[at] = table;
}

#[test]
fn the_tree_of_the_twin_is_ours_byte_for_byte_but_for_where_its_nodes_are() {
    let shape = radix::Shape::of(Abi::named("kho-v4").unwrap(), PageSize::Size4K).unwrap();
    for build in [&KERNEL, &BEST] {
        for workload in workloads() {
            let mut twin = Twin::new(build, Version::V4, 8192);
            let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
            filled(&mut twin, &mut t, &workload);
            let root = twin.serialize();
            let (start, bytes) = twin.memory();
            let theirs = (start..).step_by(4096).zip(bytes.chunks(4096).map(<[u8]>::to_vec)).collect();
            let mut at = 0;
            let ours = radix::serialize(&t, shape, || {
                at += 4096;
                Ok(Phys(at))
            });
            let ours: BTreeMap<u64, Vec<u8>> = ours.unwrap().into_iter().map(|(phys, page)| (phys.0, page)).collect();
            let (mut twins, mut own) = (Vec::new(), Vec::new());
            numbered(&theirs, root, shape.depth(), &mut twins);
            numbered(&ours, at, shape.depth(), &mut own);
            assert_eq!(twins.len(), theirs.len(), "{}", workload.name);
            assert!(twins == own, "{}", workload.name);
        }
    }
}

#[test]
fn the_twin_lists_what_we_list() {
    for workload in workloads() {
        for version in [Version::V1, Version::V4] {
            for build in [&KERNEL, &BEST] {
                let mut twin = Twin::new(build, version, 8192);
                let mut t = Tracker::new(Geometry::paged(PageSize::Size4K));
                filled(&mut twin, &mut t, &workload);
                let mut listed = vec![0; workload.len()];
                let n = twin.iterate(&mut listed, workload.len());
                let mut listed: Vec<_> =
                    listed[..n].iter().map(|x| (Order::new(x & 63).unwrap(), Pfn(x >> 6))).collect();
                // A tree's keys ascend from the largest order.
                listed.sort_unstable();
                let ours: Vec<_> = t.iter().map(|(pfn, order)| (order, pfn)).collect();
                assert_eq!(listed, ours, "{} {version:?}", workload.name);
            }
        }
    }
}

#[test]
fn a_folio_of_the_twin_is_restored_once() {
    let pfns: Vec<u64> = (0..5000).map(|n| shuffled(n, 18)).collect();
    let workload = Workload { name: "once", pfns, orders: None, span: 1 << 18 };
    for version in [Version::V1, Version::V4] {
        for build in [&KERNEL, &BEST] {
            let mut twin = Twin::for_workload(build, version, &workload);
            twin.preserve_each(&workload);
            let map = twin.serialize();
            let mut machine = Machine::new(workload.span);
            assert_eq!(machine.restore_each(build, &workload.pfns), 0);
            assert_eq!(machine.take_over(&mut twin, map, &workload), 5000);
            assert_eq!(machine.restore_each(build, &workload.pfns[..2000]), 2000);
            assert_eq!(machine.restore_each(build, &workload.pfns), 3000);
            assert_eq!(machine.restore_each(build, &[1 << 18, u64::MAX >> 12]), 0);
        }
    }
}
