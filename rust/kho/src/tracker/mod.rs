//! The tracker: which folios are preserved.
