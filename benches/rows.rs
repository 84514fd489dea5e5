//! Samples by row and peer. Criterion runs them; the table is made of these.

use criterion::Criterion;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// Every sample of a run, in the order in which rows were first seen.
#[derive(Default)]
pub(crate) struct Rows {
    cells: Vec<Cell>,
}

/// One peer in one row.
pub(crate) struct Cell {
    pub workload: &'static str,
    pub operation: &'static str,
    /// What a time is divided by.
    pub unit: &'static str,
    pub peer: String,
    /// Nanoseconds a unit, one a sample.
    pub samples: Vec<f64>,
    /// Bytes of metadata a folio.
    pub bytes: Option<f64>,
}

/// Who is measured in turns with us: a name, and a sample.
pub(crate) type Other<'a> = (String, Box<dyn FnMut() -> Duration + 'a>);

/// What the library does by two threads, done by one.
pub(crate) const ALONE: &str = "kho, one thread";

/// After how many of our samples the others have one each.
pub(crate) const EVERY: usize = 3;

/// How long `work` takes.
pub(crate) fn time<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let made = work();
    (start.elapsed(), made)
}

/// Does something where there is one processor for it. Without leave to choose one the run ends: a cell must be what it says.
#[allow(clippy::expect_used)]
pub(crate) fn one_processor<T>(work: impl FnOnce() -> T) -> T {
    let stay_on = |processors: &CpuSet| sched_setaffinity(None, processors).expect("a choice of processors");
    let all = sched_getaffinity(None).expect("the processors of this thread");
    let mut one = CpuSet::new();
    one.set((0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).expect("a processor"));
    stay_on(&one);
    let done = work();
    stay_on(&all);
    done
}

/// A row: what is done, to what, per what, and how often in one sample.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    pub workload: &'static str,
    pub operation: &'static str,
    pub unit: &'static str,
    pub units: u64,
}

impl Rows {
    /// Runs a peer's `sample` under criterion; it returns how long the work in it took. The first, in which memory
    /// is touched and caches fill, does not count.
    pub(crate) fn run(&mut self, c: &mut Criterion, row: Row, peer: &str, sample: impl FnMut() -> Duration) {
        self.turns(c, row, (peer, sample), Vec::new());
    }

    /// The same for our sample, with others in turns: what a row compares has one machine, which is not the same from
    /// one minute to the next.
    pub(crate) fn turns<'a>(
        &mut self,
        c: &mut Criterion,
        row: Row,
        (peer, mut sample): (&str, impl FnMut() -> Duration),
        others: impl IntoIterator<Item = Other<'a>>,
    ) {
        let mut ours = Vec::new();
        let mut others: Vec<_> = others.into_iter().map(|(peer, sample)| (peer, sample, Vec::new())).collect();
        c.bench_function(&format!("{} {}/{peer}", row.workload, row.operation), |b| {
            b.iter_custom(|iterations| {
                let round = |_| {
                    ours.push(sample());
                    if ours.len() % EVERY == 1 {
                        others.iter_mut().for_each(|(_, sample, samples)| samples.push(sample()));
                    }
                    ours.last().copied().unwrap_or_default()
                };
                (0..iterations).map(round).sum()
            });
        });
        self.count(row, peer, ours);
        for (peer, _, samples) in others {
            self.count(row, &peer, samples);
        }
    }

    /// Three samples: for other sets of numbers, which allocate their memory each time.
    pub(crate) fn few(&mut self, row: Row, peer: &str, mut sample: impl FnMut() -> Duration) {
        (0..3).for_each(|_| self.record(row, peer, sample().as_secs_f64()));
    }

    fn count(&mut self, row: Row, peer: &str, samples: impl IntoIterator<Item = Duration>) {
        for time in samples.into_iter().skip(1) {
            self.record(row, peer, time.as_secs_f64());
        }
    }

    /// A sample that was taken along the way.
    pub(crate) fn record(&mut self, row: Row, peer: &str, seconds: f64) {
        let sample = seconds * 1e9 / row.units as f64;
        self.cell(row, peer).samples.push(sample);
    }

    /// Bytes of metadata that a peer needs for `folios` folios.
    pub(crate) fn bytes(&mut self, row: Row, peer: &str, bytes: u64, folios: usize) {
        if self.cells.iter().any(|cell| cell.is(row, peer)) {
            self.cell(row, peer).bytes = Some(bytes as f64 / folios as f64);
        }
    }

    fn cell(&mut self, row: Row, peer: &str) -> &mut Cell {
        let at = self.cells.iter().position(|cell| cell.is(row, peer)).unwrap_or_else(|| {
            self.cells.push(Cell {
                workload: row.workload,
                operation: row.operation,
                unit: row.unit,
                peer: peer.to_owned(),
                samples: Vec::new(),
                bytes: None,
            });
            self.cells.len() - 1
        });
        &mut self.cells[at]
    }

    /// What `benches/report.py` makes a table of. No name in it needs escaping.
    pub(crate) fn json(&self, facts: &BTreeMap<&str, String>) -> String {
        let mut out = String::from("{");
        for (name, value) in facts {
            let _ = write!(out, "\"{name}\": \"{value}\", ");
        }
        out += "\"cells\": [";
        for (n, cell) in self.cells.iter().enumerate() {
            let Cell { workload, operation, unit, peer, samples, bytes } = cell;
            let bytes = bytes.map_or("null".into(), |bytes| format!("{bytes:.4}"));
            let samples: Vec<String> = samples.iter().map(|sample| format!("{sample:.6}")).collect();
            let _ = write!(
                out,
                "{}\n {{\"workload\": \"{workload}\", \"operation\": \"{operation}\", \"unit\": \"{unit}\", \"peer\": \
                 \"{peer}\", \"bytes\": {bytes}, \"samples\": [{}]}}",
                if n == 0 { "" } else { "," },
                samples.join(", ")
            );
        }
        out + "]}\n"
    }
}

impl Cell {
    fn is(&self, row: Row, peer: &str) -> bool {
        (self.workload, self.operation, &*self.peer) == (row.workload, row.operation, peer)
    }
}
