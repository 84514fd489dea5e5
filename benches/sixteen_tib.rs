//! 16 TiB preserved whole, page by page, handed over and taken over: 2^32 folios, 131072 bitmaps, 512 MiB of them.
//!
//! `cargo bench --manifest-path benches/Cargo.toml --bench sixteen_tib`. Prints what each step took, the peak of resident memory, and how both
//! compare with the goal; the exit status is 1 if it is missed. The memory is a sparse memfd, and only its
//! bitmaps are ever touched: their first touch is the floor, and is measured as well.

use kho::arena::{Arena, ArenaConfig, Backing, Region};
use kho::incoming::{Incoming, Options};
use kho::outgoing::{Outgoing, Placement};
use kho::units::{Order, PageSize, Pfn, Phys};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes preserved, and where they begin: a folio of their size may.
const TOTAL: u64 = 16 << 40;
/// More memory, for the map.
const ROOM: u64 = 4 << 30;
const PAGES: u64 = TOTAL >> 12;

const GOAL_TIME: Duration = Duration::from_secs(3);
const GOAL_PEAK: u64 = 1_288_490_188; // 1.2 GiB

/// A line of /proc/self/status in bytes, 0 where there is none.
fn status(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn arena() -> kho::Result<Arc<Arena>> {
    let regions = vec![Region { start: Phys(TOTAL), len: TOTAL + ROOM, node: 0 }];
    let max_order = Order::new(10)?;
    let arena = ArenaConfig { page: PageSize::Size4K, max_order, regions, scratch: vec![], backing: Backing::Memfd };
    Arena::new(arena)
}

/// Times steps.
struct Clock {
    began: Instant,
    last: Instant,
}

impl Clock {
    fn start() -> Self {
        let now = Instant::now();
        Clock { began: now, last: now }
    }

    fn lap(&mut self, what: &str) {
        let now = Instant::now();
        println!("  {what:<28} {:>9.1} ms", (now - self.last).as_secs_f64() * 1e3);
        self.last = now;
    }
}

/// The whole way, in one ABI; how long it took.
fn hand_over(abi: &str) -> kho::Result<Duration> {
    println!("{abi}");
    let arena = arena()?;
    let first = Pfn(PAGES);
    arena.alloc_at(first, Order::new(32)?)?;
    let mut clock = Clock::start();
    let mut out = Outgoing::new(&arena, abi, None, Placement::default())?;
    let new = out.preserve_run(first, Order::ZERO, PAGES)?;
    clock.lap("preserve");
    out.finalize()?;
    clock.lap("serialize");
    let inc = Incoming::take_over(&arena, None, &Options::default())?;
    clock.lap("take over");
    let folios = inc.preserved().len();
    clock.lap("count");
    let took = clock.began.elapsed();
    let stats = inc.stats();
    println!(
        "  {} bitmaps, {} MiB in place, {} KiB elsewhere",
        stats.blocks,
        stats.in_place_bytes >> 20,
        stats.held_bytes >> 10
    );
    // The FDT has a page more.
    if (new, folios) != (PAGES, PAGES + 1) {
        let why = format!("{new} folios preserved, {folios} found");
        return Err(kho::Error::Invalid { what: "16 TiB", why });
    }
    let mut clock = Clock::start();
    arena.alloc(Order::ZERO, None, false)?;
    clock.lap("(first allocation after it)");
    Ok(took)
}

/// What touching as many pages of a fresh memfd takes.
fn floor() -> kho::Result<Duration> {
    let arena = arena()?;
    let began = Instant::now();
    for page in 0..PAGES >> 15 {
        arena.write(Phys(TOTAL + (page << 12)), &[1])?;
    }
    Ok(began.elapsed())
}

fn run() -> kho::Result<bool> {
    println!("floor: first touch of {} MiB of pages {:.1} ms", PAGES >> 23, floor()?.as_secs_f64() * 1e3);
    let mut met = true;
    for abi in ["kho-v1", "kho-v4"] {
        let took = hand_over(abi)?;
        let ratio = took.as_secs_f64() / GOAL_TIME.as_secs_f64();
        println!("  in all {:.2} s, {ratio:.2} of the goal of {} s", took.as_secs_f64(), GOAL_TIME.as_secs());
        met &= took < GOAL_TIME;
    }
    let peak = status("VmHWM");
    let ratio = peak as f64 / GOAL_PEAK as f64;
    println!("peak {} MiB resident, {ratio:.2} of the goal of {} MiB", peak >> 20, GOAL_PEAK >> 20);
    Ok(met && peak > 0 && peak < GOAL_PEAK)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            println!("the goal is missed");
            ExitCode::from(1)
        }
        Err(e) => {
            println!("{e}");
            ExitCode::from(2)
        }
    }
}
