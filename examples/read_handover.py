"""Read what a Linux kernel handed over: `python read_handover.py core.elf`."""

import sys

import kho

inc = kho.open(sys.argv[1])
print(inc.compatible, "by Linux", inc.metadata.previous_release)
print(inc.nr_folios, "folios by order:", inc.folios_by_order)
for name, session in inc.luo.sessions.items():
    for token, file in session.files.items():
        print(f"{name}/{token:#x}: {file.size} bytes, {file.read(8).hex(' ')} ...")
