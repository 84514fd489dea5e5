//! A tracker that threads share: one thread holds all of it, or several threads hold one order each.

#![forbid(unsafe_code)]

use kho::tracker::Tracker;
use kho::units::Order;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

/// A tracker that threads share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Notified when a thread returns an order.
    back: Condvar,
}

struct State {
    tracker: Tracker,
    /// The orders that threads have taken out, one bit each.
    out: u64,
}

/// A guard that holds the whole tracker.
pub(crate) struct Whole<'a>(MutexGuard<'a, State>);

/// A guard that holds one order: a tracker with the folios of that order only, which goes back when it is dropped.
pub(crate) struct Part<'a> {
    shared: &'a Shared,
    order: Order,
    tracker: Tracker,
}

impl Shared {
    pub(crate) fn new(tracker: Tracker) -> Self {
        Shared { state: Mutex::new(State { tracker, out: 0 }), back: Condvar::new() }
    }

    /// Locks the whole tracker; waits until no other thread holds any of it.
    pub(crate) fn whole(&self) -> Whole<'_> {
        Whole(self.when(|out| out == 0))
    }

    /// Locks the whole tracker; `None` if another thread holds any of it.
    pub(crate) fn try_whole(&self) -> Option<Whole<'_>> {
        let state = match self.state.try_lock() {
            Ok(state) => state,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        (state.out == 0).then_some(Whole(state))
    }

    /// Takes one order out; waits until no other thread holds the whole tracker or this order.
    pub(crate) fn order(&self, order: Order) -> Part<'_> {
        let mut state = self.when(|out| out & bit(order) == 0);
        state.out |= bit(order);
        Part { shared: self, order, tracker: state.tracker.split_off(order) }
    }

    /// Takes the lock, and waits until `free` is true of the orders that are taken out.
    fn when(&self, free: impl Fn(u64) -> bool) -> MutexGuard<'_, State> {
        // Poison is ignored: a tracker operation that panics has changed words and counts together, or not at all.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.back.wait_while(state, |state| !free(state.out)).unwrap_or_else(PoisonError::into_inner)
    }
}

const fn bit(order: Order) -> u64 {
    1 << order.get()
}

impl Deref for Whole<'_> {
    type Target = Tracker;

    fn deref(&self) -> &Tracker {
        &self.0.tracker
    }
}

impl DerefMut for Whole<'_> {
    fn deref_mut(&mut self) -> &mut Tracker {
        &mut self.0.tracker
    }
}

impl Deref for Part<'_> {
    type Target = Tracker;

    fn deref(&self) -> &Tracker {
        &self.tracker
    }
}

impl DerefMut for Part<'_> {
    fn deref_mut(&mut self) -> &mut Tracker {
        &mut self.tracker
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.when(|_| true);
        let part = self.tracker.split_off(self.order);
        // This thread held the order, so the tracker has no blocks of it: `append` moves the part's blocks and cannot
        // fail.
        let _ = state.tracker.append(part);
        state.out &= !bit(self.order);
        self.shared.back.notify_all();
    }
}
