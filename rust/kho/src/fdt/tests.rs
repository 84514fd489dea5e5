//! What kernels wrote, what hostile bytes do, and what the writer makes of it.

#![forbid(unsafe_code)]

use super::*;
use crate::error::Result;
use proptest::collection::vec;
use proptest::prelude::*;

fn data(name: &str) -> Vec<u8> {
    let path = format!("{}/testdata/fdt/{name}.dtb", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Those that came from libfdt's sequential writer.
const SEQUENTIAL: [&str; 8] = [
    "linux-6.16-layout-out-fdt",
    "linux-6.16-layout-kho_test",
    "linux-6.16-layout-memblock",
    "linux-6.18.15-out-fdt",
    "linux-6.18.15-kho_test",
    "linux-6.18.15-memblock",
    "linux-7.3.4-kho_test",
    "linux-7.3.4-memblock",
];

#[derive(Debug, Clone, PartialEq)]
struct Tree {
    name: String,
    props: Vec<(String, Vec<u8>)>,
    children: Vec<Tree>,
}

impl Tree {
    fn of(node: Node<'_>) -> Tree {
        Tree {
            name: node.name().to_owned(),
            props: node.properties().map(|p| (p.name.unwrap().to_owned(), p.value.to_owned())).collect(),
            children: node.children().map(Tree::of).collect(),
        }
    }

    fn write(&self, w: &mut FdtWriter) -> Result<()> {
        w.begin_node(&self.name)?;
        for (name, value) in &self.props {
            w.property(name, value)?;
        }
        for child in &self.children {
            child.write(w)?;
        }
        w.end_node()
    }

    fn blob(&self, capacity: usize) -> Result<Vec<u8>> {
        let mut w = FdtWriter::new(capacity);
        self.write(&mut w)?;
        w.finish()
    }
}

fn trees() -> impl Strategy<Value = Tree> {
    // Few letters, so that names are often tails of one another.
    let props = || vec(("[ab,]{1,5}", vec(any::<u8>(), 0..10)), 0..5);
    let leaf = ("[a-d/é ]{1,6}", props()).prop_map(|(name, props)| Tree { name, props, children: Vec::new() });
    let node = leaf.prop_recursive(4, 20, 4, move |inner| {
        ("[a-d]{1,6}", props(), vec(inner, 0..4)).prop_map(|(name, props, children)| Tree { name, props, children })
    });
    node.prop_map(|mut root| {
        root.name.clear();
        root
    })
}

fn error(bytes: &[u8]) -> String {
    Fdt::parse(bytes).unwrap_err().to_string()
}

/// A blob with `word` written over offset `at`.
fn with_word(blob: &[u8], at: usize, word: u32) -> Vec<u8> {
    let mut blob = blob.to_vec();
    blob[at..at + 4].copy_from_slice(&word.to_be_bytes());
    blob
}

/// A blob of version 17 with that structure block and those strings.
fn assemble(structure: &[u32], strings: &[u8]) -> Vec<u8> {
    let len = structure.len() as u32 * 4;
    let total = 56 + len + strings.len() as u32;
    let header = [MAGIC, total, 56, 56 + len, 40, 17, 16, 0, strings.len() as u32, len];
    let words = header.iter().chain(&[0; 4]).chain(structure).flat_map(|w| w.to_be_bytes());
    words.chain(strings.iter().copied()).collect()
}

/// Of each node its path, of each property its node, name offset and value: comparable between blobs.
type Contents = (Vec<String>, Vec<(u32, u32, Vec<u8>)>);

fn contents(fdt: &Fdt) -> Contents {
    let paths = fdt.nodes().map(Node::path).collect();
    let props = fdt.nodes().flat_map(|n| n.properties().map(move |p| (n.index(), p.name_offset, p.value.to_vec())));
    (paths, props.collect())
}

#[test]
fn the_root_of_a_v1_handover_reads_as_the_kernel_wrote_it() {
    let fdt = Fdt::parse(&data("linux-6.18.15-out-fdt")).unwrap();
    let root = fdt.root().unwrap();
    assert_eq!(root.str("compatible").unwrap(), "kho-v1");
    assert_eq!(root.u64("preserved-memory-map").unwrap(), 0x6d_4000);
    let paths: Vec<_> = fdt.nodes().map(Node::path).collect();
    assert_eq!(paths, ["/", "/kho_test", "/memblock"]);
    assert_eq!(fdt.node("/kho_test").unwrap().u64("fdt").unwrap(), 0x50_a000);
    assert_eq!(fdt.totalsize(), 236);
    assert_eq!((fdt.version(), fdt.boot_cpuid()), (17, 0));
    assert!(fdt.reservations().is_empty());
    assert!(fdt.nodes().skip(1).all(|n| n.parent() == Some(root)));
}

#[test]
fn a_page_with_a_blob_at_its_start_reads_as_the_blob() {
    let blob = data("linux-7.3.4-in-fdt");
    let mut page = blob.clone();
    page.resize(4096, 0xa5);
    assert_eq!(Fdt::parse(&page).unwrap(), Fdt::parse(&blob).unwrap());
    assert_eq!(Fdt::parse(&page).unwrap().as_bytes(), blob);
}

#[test]
fn blobs_of_the_kernels_sequential_writer_come_out_byte_for_byte() {
    for name in SEQUENTIAL {
        let blob = data(name);
        let fdt = Fdt::parse(&blob).unwrap();
        let tree = Tree::of(fdt.root().unwrap());
        assert_eq!(tree.blob(4096).unwrap(), blob, "{name}");
    }
}

#[test]
fn a_placeholder_filled_late_gives_the_same_blob() {
    let blob = data("linux-6.18.15-out-fdt");
    let map = Fdt::parse(&blob).unwrap().root().unwrap().u64("preserved-memory-map");
    let mut w = FdtWriter::new(4096);
    w.begin_node("").unwrap();
    w.property_str("compatible", "kho-v1").unwrap();
    let place = w.placeholder("preserved-memory-map", 8).unwrap();
    for (name, phys) in [("kho_test", 0x50_a000), ("memblock", 0x6c_6000)] {
        w.begin_node(name).unwrap();
        w.property_u64("fdt", phys).unwrap();
        w.end_node().unwrap();
    }
    w.end_node().unwrap();
    assert_ne!(w.to_blob().unwrap(), blob);
    assert!(w.fill(place, &[0; 4]).is_err());
    w.fill(place, &map.unwrap().to_le_bytes()).unwrap();
    assert_eq!(w.finish().unwrap(), blob);
}

#[test]
fn a_blob_without_its_strings_keeps_its_values() {
    let cut = data("linux-7.3.4-out-fdt");
    let (fdt, problem) = Fdt::parse_partial(&cut).unwrap();
    let problem = problem.unwrap().to_string();
    assert_eq!(problem, "FDT at offset 0xe9: cut short: 233 bytes of 405");
    assert_eq!(error(&cut), problem);
    let paths: Vec<_> = fdt.nodes().map(Node::path).collect();
    assert_eq!(paths, ["/", "/memblock", "/LUO", "/kho_test"]);
    let root: Vec<_> = fdt.root().unwrap().properties().collect();
    assert_eq!((root[0].name, root[0].name_offset), (None, 21));
    assert_eq!(root[0].value, b"kho-v4\0");
    assert_eq!(root[1].name_offset, 0);
    assert_eq!(root[1].value, 0x4e_e000u64.to_le_bytes());
    assert!(fdt.root().unwrap().prop("compatible").is_none());

    let whole = Fdt::parse(&data("linux-7.3.4-in-fdt")).unwrap();
    assert!(contents(&whole).1.starts_with(&contents(&fdt).1));
}

#[test]
fn a_property_is_read_as_what_its_length_allows() {
    let mut w = FdtWriter::new(4096);
    w.begin_node("").unwrap();
    w.property_u32("word", 0x0102_0304).unwrap();
    w.property("strings", b"a\0\0bc\0").unwrap();
    w.property("open", b"ab").unwrap();
    w.property("empty", b"").unwrap();
    w.property("latin", b"\xff\0").unwrap();
    w.end_node().unwrap();
    let blob = w.finish().unwrap();
    let fdt = Fdt::parse(&blob).unwrap();
    let root = fdt.root().unwrap();
    assert_eq!(root.prop("word").unwrap(), [4, 3, 2, 1]);
    assert_eq!(root.u32("word").unwrap(), 0x0102_0304);
    assert_eq!(root.u64("word").unwrap_err().to_string(), "FDT at offset 0x48: property \"word\" has 4 bytes, not 8");
    assert_eq!(root.strings("strings").unwrap(), ["a", "", "bc"]);
    assert!(root.strings("empty").unwrap().is_empty());
    for (name, what) in [("strings", "several"), ("open", "no NUL"), ("empty", "nothing"), ("latin", "no UTF-8")] {
        let error = root.str(name).unwrap_err().to_string();
        assert!(error.ends_with("is not one NUL-terminated string"), "{what}: {error}");
    }
    assert_eq!(root.u32("none").unwrap_err().to_string(), "FDT at offset 0x40: no property \"none\"");
    for path in ["/none", "none", "", "//word"] {
        let error = fdt.node(path).unwrap_err().to_string();
        assert!(error.ends_with(&format!("no node {path:?}")), "{error}");
    }
    assert_eq!(fdt.node("//").unwrap(), root);
}

#[test]
fn a_bad_header_is_named_with_its_field() {
    let good = data("linux-6.18.15-memblock");
    for (at, word, message) in [
        (0, 0xfeed_d00d, "0x0: magic 0xfeedd00d, not 0xd00dfeed"),
        (4, 0x1000, "0xd2: cut short: 210 bytes of 4096"),
        (20, 15, "0x14: version 15 (last compatible 16); 16 and 17 are readable"),
        (24, 18, "0x14: version 17 (last compatible 18); 16 and 17 are readable"),
        (8, 0xd4, "0x8: structure block at 0xd4 (+0x7c) does not fit a blob of 0xd2 bytes"),
        (8, 0x41, "0x8: structure block at 0x41 is not a multiple of 4"),
        (8, 0x20, "0x8: structure block at 0x20 (+0x7c) does not fit a blob of 0xd2 bytes"),
        (12, 0xffff_ffff, "0xc: strings block at 0xffffffff (+0x16) does not fit a blob of 0xd2 bytes"),
        (12, 0xb8, "0xc: strings block at 0xb8 (+0x16) does not fit a blob of 0xd2 bytes"),
        (16, 0x34, "0x10: reservation map at 0x34 is not a multiple of 8"),
        (16, 0x48, "0x10: reservation map at 0x48 (+0x0) does not fit a blob of 0xd2 bytes"),
        (16, 0xc0, "0x10: reservation map at 0xc0 (+0x0) does not fit a blob of 0xd2 bytes"),
        (36, 0xffff_fff0, "0x8: structure block at 0x40 (+0xfffffff0) does not fit a blob of 0xd2 bytes"),
        (36, 0x70, "0xb0: cut short: 0 bytes of 4"),
        (0x30, 1, "0x10: reservation map at 0x30 (+0x20) does not fit a blob of 0x40 bytes"),
    ] {
        let blob = with_word(&good, at, word);
        assert_eq!(error(&blob), format!("FDT at offset {message}"));
    }
    assert_eq!(error(&good[..39]), "FDT at offset 0x0: cut short: 39 bytes of 40");
    assert!(Fdt::parse_partial(&good[..39]).is_err());
    assert!(Fdt::parse_partial(&good[..40]).is_ok());
}

#[test]
fn a_bad_structure_is_named_with_its_offset() {
    let mut deep: Vec<u32> = [1, 0x6100_0000].repeat(65);
    deep[1] = 0;
    for (structure, message) in [
        (&[][..], "0x38: cut short: 0 bytes of 4"),
        (&[9], "0x38: END before the root node"),
        (&[2], "0x38: END_NODE without a node"),
        (&[1, 0], "0x40: cut short: 0 bytes of 4"),
        (&[1, 0, 9], "0x40: END inside a node"),
        (&[1, 0, 2], "0x44: cut short: 0 bytes of 4"),
        (&[1, 0, 2, 1, 0, 2, 9], "0x44: a second root node"),
        (&[3, 0, 0, 9], "0x38: a property outside of any node"),
        (&[1, 0, 2, 3, 0, 0, 9], "0x44: a property outside of any node"),
        (&[1, 0, 1, 0x6100_0000, 2, 3, 0, 0, 2, 9], "0x4c: a property after a subnode, where libfdt does not look"),
        (&[1, 0, 7], "0x40: unknown token 0x7"),
        (&[1, 0x6161_6161], "0x3c: name is unterminated, empty, not printable or over 255 bytes"),
        (&[1, 0x6100_0000, 2, 9], "0x3c: the root node has a name"),
        (&[1, 0, 1, 0, 2, 2, 9], "0x44: name is unterminated, empty, not printable or over 255 bytes"),
        (&[1, 0, 1, 0x611b_0000, 2, 2, 9], "0x44: name is unterminated, empty, not printable or over 255 bytes"),
        (&[1, 0, 3, 5, 0, 0], "0x4c: cut short: 4 bytes of 5"),
        (&[1, 0, 3, u32::MAX, 0, 0], "0x4c: cut short: 4 bytes of 4294967295"),
        (&[1, 0, 3], "0x44: cut short: 0 bytes of 4"),
        (&[1, 0, 3, 0, 2, 2, 9], "0x48: property name at string offset 0x2 is not there"),
        (&[1, 0, 3, 0, u32::MAX, 2, 9], "0x48: property name at string offset 0xffffffff is not there"),
        (
            // The empty name at the NUL of "r".
            &[1, 0, 3, 0, 1, 2, 9],
            "0x55: name is unterminated, empty, not printable or over 255 bytes",
        ),
        (&deep, "0x238: nodes nest deeper than 64"),
    ] {
        assert_eq!(error(&assemble(structure, b"r\0")), format!("FDT at offset {message}"));
    }
    let unterminated = assemble(&[1, 0, 3, 0, 0, 2, 9], b"reg");
    assert!(error(&unterminated).contains("0x54: name is unterminated"));
    let long = assemble(&[1, 0, 3, 0, 0, 2, 9], &[[b'a'; 256].as_slice(), b"\0"].concat());
    assert!(error(&long).contains("0x54: name is unterminated"));
    let longest = assemble(&[1, 0, 3, 0, 1, 2, 9], &[[b'a'; 256].as_slice(), b"\0"].concat());
    assert!(Fdt::parse(&longest).is_ok());
}

#[test]
fn nops_are_skipped_wherever_they_stand() {
    let blob = assemble(&[4, 1, 0, 4, 3, 0, 0, 4, 1, 0x6100_0000, 4, 2, 4, 2, 4, 9], b"r\0");
    let fdt = Fdt::parse(&blob).unwrap();
    assert_eq!(fdt.node("/a").unwrap().parent(), fdt.root().ok());
    assert_eq!(fdt.root().unwrap().prop("r"), Some(&[][..]));
}

#[test]
fn a_blob_of_version_16_has_a_header_of_36_bytes() {
    // The structure block's length is not said: it ends where the strings begin.
    let words: [u32; 20] = [MAGIC, 86, 56, 84, 40, 16, 16, 3, 2, 0, 0, 0, 0, 0, 1, 0, 3, 0, 0, 2];
    let mut blob: Vec<u8> = words.iter().flat_map(|w| w.to_be_bytes()).collect();
    blob.extend_from_slice(&9u32.to_be_bytes());
    blob.extend_from_slice(b"r\0");
    let fdt = Fdt::parse(&blob).unwrap();
    assert_eq!((fdt.version(), fdt.boot_cpuid()), (16, 3));
    assert_eq!(fdt.root().unwrap().prop("r"), Some(&[][..]));
    assert!(error(&with_word(&blob, 80, 4)).contains("cut short: 0 bytes of 4"));
}

#[test]
fn of_two_properties_or_children_with_one_name_the_first_counts() {
    let a = 0x6100_0000;
    let structure = [1, 0, 3, 1, 0, 7 << 24, 3, 1, 0, 8 << 24, 1, a, 2, 1, a, 3, 0, 0, 2, 2, 9];
    let fdt = Fdt::parse(&assemble(&structure, b"r\0")).unwrap();
    let root = fdt.root().unwrap();
    assert_eq!(root.prop("r"), Some(&[7][..]));
    assert_eq!((root.properties().len(), root.children().count()), (2, 2));
    assert_eq!(fdt.node("/a").unwrap(), root.children().next().unwrap());
}

#[test]
fn reservations_are_written_and_read() {
    let mut w = FdtWriter::new(4096);
    w.add_reservemap_entry(0x1000, 0x2000).unwrap();
    w.add_reservemap_entry(u64::MAX, 1).unwrap();
    assert!(w.add_reservemap_entry(0, 0).is_err());
    w.begin_node("").unwrap();
    assert!(w.add_reservemap_entry(1, 1).is_err());
    w.end_node().unwrap();
    let fdt = Fdt::parse(&w.finish().unwrap()).unwrap();
    assert_eq!(fdt.reservations(), [(0x1000, 0x2000), (u64::MAX, 1)]);
}

#[test]
fn a_name_is_found_inside_the_newest_name_that_ends_with_it() {
    let mut w = FdtWriter::new(4096);
    w.begin_node("").unwrap();
    for name in ["reg", "linux,reg", "reg", "eg", "x"] {
        w.property(name, b"").unwrap();
    }
    w.end_node().unwrap();
    let blob = w.finish().unwrap();
    assert!(blob.ends_with(b"x\0linux,reg\0reg\0"));
    let fdt = Fdt::parse(&blob).unwrap();
    let offsets: Vec<_> = fdt.root().unwrap().properties().map(|p| p.name_offset).collect();
    assert_eq!(offsets, [12, 2, 8, 9, 0]);
}

#[test]
fn calls_out_of_order_are_refused_and_change_nothing() {
    let mut w = FdtWriter::new(4096);
    let why = |r: Result<()>| r.unwrap_err().to_string();
    assert!(why(w.end_node()).ends_with("0x40: end_node without a node"));
    assert!(why(w.property("a", b"")).ends_with("a property outside of any node"));
    assert!(why(w.begin_node("root")).ends_with("the root node has no name"));
    assert!(w.to_blob().is_err());
    w.begin_node("").unwrap();
    assert!(w.to_blob().is_err());
    for name in ["", "a\0", "a\n", &"a".repeat(256)] {
        assert!(w.begin_node(name).is_err(), "{name:?}");
        assert!(w.property(name, b"").is_err(), "{name:?}");
    }
    assert!(w.property_str("a", "b\0").is_err());
    w.begin_node(&"a".repeat(255)).unwrap();
    w.end_node().unwrap();
    assert!(why(w.property("a", b"")).ends_with("a property after a subnode"));
    w.end_node().unwrap();
    assert!(why(w.begin_node("")).ends_with("a second root node"));
    assert!(why(w.property("a", b"")).ends_with("a property outside of any node"));

    let fdt = Fdt::parse(&w.finish().unwrap()).unwrap();
    let names: Vec<_> = fdt.nodes().map(Node::name).collect();
    assert_eq!(names, ["", &"a".repeat(255)]);
    assert_eq!(fdt.totalsize(), 0x48 + 4 + 256 + 4 + 4 + 4);
}

#[test]
fn a_property_that_does_not_fit_with_its_name_leaves_room_for_the_end() {
    // Map and root node to 0x48, PROP of 12 bytes, a new name of 2; END_NODE and END of 4 each.
    let mut w = FdtWriter::new(0x48 + 12 + 1);
    w.begin_node("").unwrap();
    let error = w.property("a", b"").unwrap_err().to_string();
    assert_eq!(error, "FDT at offset 0x48: does not fit its buffer of 85 bytes");
    w.end_node().unwrap();
    let blob = w.finish().unwrap();
    assert_eq!(blob.len(), 0x48 + 8);
    assert_eq!(Fdt::parse(&blob).unwrap().nodes().len(), 1);
}

#[test]
fn the_writer_nests_as_deep_as_the_reader_and_no_deeper() {
    let mut w = FdtWriter::new(1 << 20);
    w.begin_node("").unwrap();
    for _ in 1..MAX_DEPTH {
        w.begin_node("a").unwrap();
    }
    assert!(w.begin_node("a").is_err());
    while w.depth() > 0 {
        w.end_node().unwrap();
    }
    let fdt = Fdt::parse(&w.finish().unwrap()).unwrap();
    assert_eq!(fdt.nodes().len(), 64);
}

#[test]
fn another_writers_placeholder_is_refused() {
    let mut a = FdtWriter::new(4096);
    a.begin_node("").unwrap();
    let place = a.placeholder("a", 8).unwrap();
    assert!(FdtWriter::new(4096).fill(place, &[0; 8]).is_err());
}

#[test]
fn four_mebibytes_of_anything_are_refused_or_read_in_linear_time() {
    let started = std::time::Instant::now();
    for byte in [0, 0xff] {
        assert!(Fdt::parse(&vec![byte; 4 << 20]).is_err());
    }
    // Every property named by the same long string, and every node a child of the root.
    let mut structure = vec![1, 0];
    structure.extend([3, 0, 0].repeat(150_000));
    structure.extend([1, 0x6100_0000, 2].repeat(150_000));
    structure.extend([2, 9]);
    let strings = [vec![b'a'; 1 << 20], vec![0]].concat();
    let (fdt, problem) = Fdt::parse_partial(&assemble(&structure, &strings)).unwrap();
    assert!(problem.unwrap().to_string().contains("over 255 bytes"));
    assert_eq!(fdt.root().unwrap().properties().len(), 150_000);
    assert_eq!(fdt.root().unwrap().children().count(), 150_000);
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}

#[test]
fn every_prefix_of_a_kernels_blob_gives_a_prefix_of_its_contents() {
    for name in SEQUENTIAL.iter().chain(&["linux-7.3.4-in-fdt"]) {
        every_prefix_gives_a_prefix(&data(name));
    }
}

fn every_prefix_gives_a_prefix(blob: &[u8]) {
    let (paths, props) = contents(&Fdt::parse(blob).unwrap());
    let mut most = (0, 0);
    for len in 0..blob.len() {
        assert!(Fdt::parse(&blob[..len]).is_err());
        let Ok((fdt, problem)) = Fdt::parse_partial(&blob[..len]) else {
            assert!(len < HEADER_V17);
            continue;
        };
        assert!(problem.unwrap().to_string().contains("cut short"));
        let (some_paths, some_props) = contents(&fdt);
        assert!(paths.starts_with(&some_paths) && props.starts_with(&some_props));
        let now = (some_paths.len(), some_props.len());
        assert!(now.0 >= most.0 && now.1 >= most.1);
        most = now;
    }
    assert_eq!(most, (paths.len(), props.len()));
}

#[test]
fn every_single_bit_flip_of_a_kernels_blob_is_read_or_refused() {
    for name in ["linux-6.18.15-kho_test", "linux-7.3.4-in-fdt"] {
        let good = data(name);
        let whole = Fdt::parse(&good).unwrap();
        let mut refused = 0;
        for bit in 0..good.len() * 8 {
            let mut blob = good.clone();
            blob[bit / 8] ^= 1 << (bit % 8);
            refused += u32::from(agree(&blob).is_none_or(|fdt| {
                assert_ne!(fdt, whole);
                false
            }));
        }
        assert!(refused > 100, "{refused}");
    }
}

/// Both readers agree on the first problem, and whatever was read can be looked at.
fn agree(blob: &[u8]) -> Option<Fdt> {
    let strict = Fdt::parse(blob);
    match Fdt::parse_partial(blob) {
        Ok((fdt, problem)) => {
            let strict_error = strict.as_ref().err().map(ToString::to_string);
            assert_eq!(strict_error, problem.map(|p| p.to_string()));
            assert!(fdt.as_bytes().len() <= blob.len().min(fdt.totalsize() as usize));
            for node in fdt.nodes() {
                assert!(node.path().starts_with('/'));
                assert!(node.children().all(|child| child.parent() == Some(node)));
                for p in node.properties() {
                    assert!(p.name.is_none_or(|name| !name.is_empty()));
                    assert!(p.value.len() <= blob.len());
                }
            }
        }
        Err(e) => assert_eq!(strict.as_ref().unwrap_err().to_string(), e.to_string()),
    }
    strict.ok()
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(tree in trees()) {
        let blob = tree.blob(1 << 16).unwrap();
        let fdt = Fdt::parse(&blob).unwrap();
        prop_assert_eq!(Tree::of(fdt.root().unwrap()), tree);
        prop_assert_eq!(fdt.as_bytes(), blob);
    }

    #[test]
    fn the_smallest_buffer_that_suffices_has_the_blobs_size(tree in trees()) {
        let blob = tree.blob(1 << 16).unwrap();
        prop_assert_eq!(tree.blob(blob.len()).unwrap(), blob.clone());
        for less in 1..blob.len().min(70) {
            let error = tree.blob(blob.len() - less).unwrap_err().to_string();
            prop_assert!(error.contains("does not fit its buffer"), "{}", error);
        }
    }

    #[test]
    fn prefixes_of_any_tree_give_prefixes(tree in trees()) {
        every_prefix_gives_a_prefix(&tree.blob(1 << 16).unwrap());
    }

    #[test]
    fn arbitrary_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..300)) {
        agree(&bytes);
    }

    #[test]
    fn arbitrary_words_behind_a_good_header_are_read_or_refused(
        words in vec(prop_oneof![4 => 0u32..10, 1 => any::<u32>(), 1 => Just(0x6100_0000)], 0..60),
        strings in vec(any::<u8>(), 0..10),
    ) {
        agree(&assemble(&words, &strings));
    }

    #[test]
    fn arbitrary_header_fields_are_read_or_refused(fields in vec((1usize..10, prop_oneof![0u32..300, any::<u32>()]), 1..4)) {
        let mut blob = data("linux-6.18.15-kho_test");
        for (field, word) in fields {
            blob = with_word(&blob, field * 4, word);
        }
        agree(&blob);
    }
}
