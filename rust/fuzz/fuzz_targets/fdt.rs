//! Any bytes as a devicetree: no panic, both readers agree, and what was read whole is written back whole.

#![no_main]

use kho::fdt::{Fdt, FdtWriter};
use libfuzzer_sys::fuzz_target;

fn contents(fdt: &Fdt) -> Vec<(String, Vec<(Option<&str>, &[u8])>)> {
    let nodes = fdt.nodes();
    nodes
        .map(|n| {
            (
                n.path(),
                n.properties().map(|p| (p.name, p.value)).collect(),
            )
        })
        .collect()
}

fn rewrite(fdt: &Fdt) -> kho::Result<Vec<u8>> {
    let mut w = FdtWriter::new(1 << 20);
    for &(address, size) in fdt.reservations() {
        w.add_reservemap_entry(address, size)?;
    }
    for node in fdt.nodes() {
        let depth = std::iter::successors(node.parent(), |n| n.parent()).count();
        while w.depth() > depth {
            w.end_node()?;
        }
        w.begin_node(node.name())?;
        for p in node.properties() {
            w.property(p.name.unwrap_or_default(), p.value)?;
        }
    }
    while w.depth() > 0 {
        w.end_node()?;
    }
    w.finish()
}

fuzz_target!(|bytes: &[u8]| {
    let strict = Fdt::parse(bytes);
    match Fdt::parse_partial(bytes) {
        Ok((fdt, problem)) => {
            assert_eq!(
                strict.as_ref().err().map(ToString::to_string),
                problem.map(|p| p.to_string())
            );
            assert!(contents(&fdt).iter().all(|(path, _)| path.starts_with('/')));
        }
        Err(_) => assert!(strict.is_err()),
    }
    if let Ok(fdt) = strict {
        let again = Fdt::parse(&rewrite(&fdt).unwrap()).unwrap();
        assert_eq!(contents(&again), contents(&fdt));
        assert_eq!(again.reservations(), fdt.reservations());
    }
});
