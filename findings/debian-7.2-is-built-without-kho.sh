#!/usr/bin/env bash
# Guess: a distribution's Linux 7.2 hands memory over, and `grep KEXEC_HANDOVER=y` in its configuration shows that.
# What happens: Debian's 7.2.13 leaves CONFIG_KEXEC_HANDOVER and CONFIG_LIVEUPDATE out on amd64 and arm64, in the
#   cloud flavors too, although DEFERRED_STRUCT_PAGE_INIT, which it sets, no longer excludes KHO from 7.2 on. The grep
#   matches all the same: CONFIG_ARCH_SUPPORTS_KEXEC_HANDOVER=y says what the architecture could do. Such a kernel
#   ignores a handover that it is passed, and boots cold. The configuration's first lines name 7.2.13, where the
#   kernel's release is 7.2.13+deb14-amd64.
# Versions: Debian linux-base-7.2.13+deb14-{amd64,cloud-amd64,arm64,cloud-arm64} 7.2.13-1 (unstable, November 2026).
#   Exits 77 where the archive has no such packages any more.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
cd "$tmp"
for flavor in amd64 cloud-amd64 arm64 cloud-arm64; do
    architecture=${flavor##*-}
    release=7.2.13+deb14-$flavor
    package=linux-base-${release}_7.2.13-1_$architecture.deb
    if ! curl -sfL --max-time 120 -o "$package" "http://deb.debian.org/debian/pool/main/l/linux/$package"; then
        echo "$package is not in the archive"
        exit 77
    fi
    dpkg -x "$package" root
    config=root/usr/lib/modules/$release/config
    echo "$release: $(sed -n 's/^# \(Linux.*\)/\1/p' "$config" | head -1)"
    grep -E 'KEXEC_HANDOVER|DEFERRED_STRUCT_PAGE_INIT' "$config" | sed 's/^/    /'
    grep -q '^# CONFIG_KEXEC_HANDOVER is not set$' "$config"
    grep -q '^CONFIG_ARCH_SUPPORTS_KEXEC_HANDOVER=y$' "$config"
    grep -q '^CONFIG_DEFERRED_STRUCT_PAGE_INIT=y$' "$config"
    ! grep -q '^CONFIG_LIVEUPDATE=' "$config"
    grep -q '^# Linux/[a-z0-9]* 7\.2\.13 Kernel Configuration$' "$config"
done
echo "as stated above"
