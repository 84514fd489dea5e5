//! What the benches share: the workloads, the C twin of the kernel's bookkeeping, and how the library is called.

pub mod api;
pub mod memory;
pub mod twin;
pub mod workload;
