//! Any bytes as a file of memory: ELF, kdump, flattened, LiME or raw. No panic; what is claimed can be asked for.

#![no_main]

use kho::memory::{FileMemory, PhysMemory};
use kho::units::Phys;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(memory) = FileMemory::from_bytes("fuzz", bytes.to_vec()) else { return };
    // More would be time spent on copying what other pages have shown.
    for range in memory.ranges().iter().take(16) {
        let mut buf = vec![0; range.len.min(1 << 14) as usize];
        let _ = memory.read(range.start, &mut buf);
        let _ = memory.read(Phys(range.start.0 + range.len / 2), &mut buf[..1]);
    }
    let mut at = Phys(0);
    for _ in 0..1000 {
        let Ok(Some(run)) = memory.next_data(at) else { break };
        assert!(run.start >= at && run.len > 0 && memory.contains(run.start, run.len));
        let Some(next) = run.start.0.checked_add(run.len) else { break };
        at = Phys(next);
    }
    let _ = (memory.machine(), memory.notes().count(), memory.truncated().len());
});
