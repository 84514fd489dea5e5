//! Flattened devicetrees: a hostile-safe reader and libfdt's sequential writer.
