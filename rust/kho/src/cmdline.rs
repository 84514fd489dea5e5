//! The kernel's command line: `kho=` and `kho_scratch=`, parsed as the kernel parses them.
