"""Linux Kexec HandOver (KHO) in userspace."""
