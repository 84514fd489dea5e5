//! From one owner to the next: serialize, take over, restore.

use crate::rows::{ALONE, EVERY, Row, Rows, one_processor, time};
use crate::sets::{TWINS, in_turn, twins};
use criterion::Criterion;
use kho::Result;
use kho::tracker::Tracker;
use kho::units::Order;
use kho_benches::api;
use kho_benches::twin::{Machine, Version};
use kho_benches::workload::{Workload, shuffled};

/// How often everything is taken over; once does not count.
const ROUNDS: usize = 12;

/// What was found wrong ends the run: a row that did not do its work must not be in the table.
#[allow(clippy::expect_used)]
fn done<T>(result: Result<T>) -> T {
    result.expect("a handover")
}

/// All three, for folios of order 0.
pub(crate) fn all(rows: &mut Rows, c: &mut Criterion, workload: &Workload) {
    let folios = api::in_arena(workload);
    serialize(rows, c, workload, &folios);
    take_over(rows, workload, &folios);
}

fn serialize(rows: &mut Rows, c: &mut Criterion, workload: &Workload, folios: &Tracker) {
    let blocks = folios.blocks(Order::ZERO).count() as u64;
    let row = Row { workload: workload.name, operation: "serialize", unit: "block", units: blocks };
    let live = Row { operation: "finalize when live (kho-v4)", unit: "call", units: 1, ..row };
    let mut twins = twins(workload);
    let each = twins.iter_mut().zip(TWINS).filter(|(_, (_, version))| *version == Version::V1).map(|(twin, _)| {
        twin.preserve_each(workload);
        in_turn(twin.name(), || time(|| twin.serialize_again()).0)
    });
    let arena = done(api::arena(workload.span));
    let finalize = |abi| {
        let mut out = done(api::outgoing(&arena, abi, folios));
        move || {
            let took = time(|| done(out.finalize())).0;
            done(out.abort());
            took
        }
    };
    rows.turns(c, row, ("kho", finalize("kho-v1")), each);
    rows.run(c, live, "kho", finalize("kho-v4"));
}

/// Taking over, then restoring every folio in another random order.
fn take_over(rows: &mut Rows, workload: &Workload, folios: &Tracker) {
    let units = workload.len() as u64;
    let mark = Row { workload: workload.name, operation: "mark on take-over", unit: "folio", units };
    let restore = Row { operation: "restore once, random", ..mark };
    let bits = workload.span.ilog2();
    let mut pfns = workload.pfns.clone();
    pfns.sort_unstable_by_key(|pfn| shuffled(*pfn ^ 0x5a5a, bits));

    let phys = api::addresses(&pfns);
    let each = Row { operation: "restore once, one call each", ..mark };
    let checked = Row { operation: "verify the map", ..mark };
    let mut machine = Machine::new(workload.span);
    let mut twins = twins(workload).map(|mut twin| {
        twin.preserve_each(workload);
        let map = twin.serialize();
        (twin, map)
    });
    for round in 0..ROUNDS {
        let arena = done(api::arena(workload.span));
        let mut out = done(api::outgoing(&arena, "kho-v1", folios));
        done(out.finalize());
        drop(out);
        // What is counted when it is first asked for belongs to taking over.
        let take = || {
            time(|| {
                let incoming = done(api::take_over(&arena));
                assert!(incoming.preserved().len() > units);
                incoming
            })
        };
        let alone = round % 4 == 3;
        let (taker, (took, incoming)) = if alone { (ALONE, one_processor(take)) } else { ("kho", take()) };
        let verify = || time(|| assert_eq!(kho::verify::check(&incoming, &[], 1).outside.count, 0)).0;
        let checks = [("kho", verify()), (ALONE, one_processor(verify))];
        // Every third time a call each.
        let (row, restored) = match round % 3 {
            2 => (each, time(|| done(api::restore_each(&incoming, &pfns))).0),
            _ => (restore, time(|| done(api::restore_many(&incoming, &phys))).0),
        };
        // The FDT's page is the one folio left.
        assert_eq!(incoming.nr_restored(), units);
        // The first time memory is touched and caches fill.
        if round > 0 {
            rows.record(mark, taker, took.as_secs_f64());
            checks.into_iter().for_each(|(who, took)| rows.record(checked, who, took.as_secs_f64()));
            rows.record(row, "kho", restored.as_secs_f64());
        }
        // In turns with the twin, as `Rows::turns`.
        for ((build, _), (twin, map)) in TWINS.iter().zip(&mut twins).filter(|_| round % EVERY == 0) {
            let (took, n) = time(|| machine.take_over(twin, *map, workload));
            assert_eq!(n, workload.len());
            let (restored, n) = time(|| machine.restore_each(build, &pfns));
            assert_eq!(n, workload.len());
            if round > 0 {
                rows.record(mark, &twin.name(), took.as_secs_f64());
                rows.record(restore, &twin.name(), restored.as_secs_f64());
            }
        }
    }
}
