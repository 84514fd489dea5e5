//! Work split over two threads, with a fallback: if a thread cannot be started, the caller does its work too.

#![forbid(unsafe_code)]

#[cfg(test)]
use crate::tuning::override_tuning;
use crate::tuning::tuning;
use std::num::NonZero;
use std::panic;
use std::thread::{self, Builder};

/// Bytes of work per thread: reading them takes several times as long as starting a thread.
const BYTES_PER_THREAD: usize = 4 << 20;

/// How many threads pay for reading `bytes` bytes: at most one per processor.
pub(crate) fn threads_for(bytes: usize) -> usize {
    match bytes / tuning().bytes_per_thread.unwrap_or(BYTES_PER_THREAD) {
        few @ 0..2 => few,
        many => many.min(processors()),
    }
}

/// The number of processors this process may use. A system call, slower than processing a short list.
pub(crate) fn processors() -> usize {
    match tuning().bytes_per_thread {
        Some(_) => 2,
        None => thread::available_parallelism().map_or(1, NonZero::get),
    }
}

/// Runs two closures concurrently, the second in a new thread, and returns both results.
///
/// If no thread can be started (limits of processes or memory), `b` runs in this thread after `a`. A panic of `b` is
/// propagated.
pub(crate) fn join<A, B: Send>(a: impl FnOnce() -> A, b: impl Fn() -> B + Sync) -> (A, B) {
    #[cfg(test)]
    let b = {
        let mine = tuning();
        move || {
            override_tuning(mine);
            b()
        }
    };
    thread::scope(|scope| {
        let spawned = Builder::new().spawn_scoped(scope, &b);
        let a = a();
        let b = spawned.map_or_else(|_| b(), |b| b.join().unwrap_or_else(|why| panic::resume_unwind(why)));
        (a, b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_closures_run_concurrently_and_may_wait_for_each_other() {
        let (say, hear) = std::sync::mpsc::sync_channel(0);
        let hear = std::sync::Mutex::new(hear);
        let (a, b) = join(|| say.send(7), || hear.lock().unwrap().recv());
        assert_eq!((a, b), (Ok(()), Ok(7)));
    }
}
