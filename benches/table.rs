//! The Rust half of `make bench`: W1, W2, W3 by this library, the C twin, and other sets.
//!
//! `cargo bench --manifest-path benches/Cargo.toml`, and a filter after `--` as criterion takes it. Every sample goes to
//! `KHO_BENCH_JSON` (else target/bench.json), from which benches/report.py makes the table.

mod floors;
mod handover;
mod peers;
mod rows;
mod sets;
mod threads;

use criterion::{Criterion, criterion_group, criterion_main};
use kho_benches::workload::{self, Workload};
use rows::Rows;
use std::collections::BTreeMap;
use std::time::Duration;

fn all(c: &mut Criterion) {
    let mut rows = Rows::default();
    let n = workload::size();
    floors::all(&mut rows, c);
    let w1 = Workload::w1(n);
    sets::all(&mut rows, c, &w1);
    threads::all(&mut rows, &w1);
    handover::all(&mut rows, c, &w1);
    drop(w1);
    let w2 = Workload::w2(n);
    sets::all(&mut rows, c, &w2);
    sets::range(&mut rows, c, &w2);
    drop(w2);
    sets::all(&mut rows, c, &Workload::w3(n));
    let path = std::env::var("KHO_BENCH_JSON").unwrap_or_else(|_| "target/bench.json".into());
    let facts = BTreeMap::from([("folios", n.to_string()), ("arch", std::env::consts::ARCH.to_owned())]);
    if let Err(e) = std::fs::write(&path, rows.json(&facts)) {
        eprintln!("{path}: {e}");
        std::process::exit(2);
    }
}

/// As few samples as criterion takes: a sample is one pass over millions of folios.
fn config() -> Criterion {
    Criterion::default()
        .without_plots()
        .sample_size(10)
        .nresamples(1000)
        .warm_up_time(Duration::from_nanos(1))
        .measurement_time(Duration::from_nanos(1))
}

criterion_group! {
    name = benches;
    config = config();
    targets = all
}
criterion_main!(benches);
