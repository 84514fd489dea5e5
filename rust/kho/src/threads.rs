//! Work for more than one processor. A thread may not be had (limits of processes, of a container, of memory): then
//! whoever asked does its work as well.

#![forbid(unsafe_code)]

#[cfg(test)]
use crate::ways::go;
use crate::ways::ways;
use std::num::NonZero;
use std::panic;
use std::thread::{self, Builder};

/// Bytes that a thread more is worth: what takes several times as long to look at as a thread takes to start.
const WORTH_A_THREAD: usize = 4 << 20;

/// How many threads looking at so many bytes is worth: at most one for each processor.
pub(crate) fn threads_for(bytes: usize) -> usize {
    match bytes / ways().worth_a_thread.unwrap_or(WORTH_A_THREAD) {
        few @ 0..2 => few,
        many => many.min(processors()),
    }
}

/// How many processors this process may use. To ask takes longer than a short list does.
pub(crate) fn processors() -> usize {
    match ways().worth_a_thread {
        Some(_) => 2,
        None => thread::available_parallelism().map_or(1, NonZero::get),
    }
}

/// Does two things at the same time, the second in a thread of its own.
pub(crate) fn both<A, B: Send>(a: impl FnOnce() -> A, b: impl Fn() -> B + Sync) -> (A, B) {
    #[cfg(test)]
    let b = {
        let mine = ways();
        move || {
            go(mine);
            b()
        }
    };
    thread::scope(|scope| {
        let beside = Builder::new().spawn_scoped(scope, &b);
        let a = a();
        let b = beside.map_or_else(|_| b(), |b| b.join().unwrap_or_else(|why| panic::resume_unwind(why)));
        (a, b)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_are_done_and_may_wait_for_each_other() {
        let (say, hear) = std::sync::mpsc::sync_channel(0);
        let hear = std::sync::Mutex::new(hear);
        let (a, b) = both(|| say.send(7), || hear.lock().unwrap().recv());
        assert_eq!((a, b), (Ok(()), Ok(7)));
    }
}
