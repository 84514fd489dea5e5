"""A decoder of your own, and a handover to try it on: `python declared_decoder.py handover.elf`."""

import sys

import kho
from kho.formats import Declared, Record, decoder, text, u16, u32, u64, vmalloc


class Ring(Record):
    """A ring of the device: `struct widget_ring { u64 pfn; u32 entries; u16 flags; u16 cpu; } __packed;`"""

    pfn = u64(unit="pfn", owns="data")
    entries = u32()
    flags = u16(flags={1: "running", 2: "masked"})
    cpu = u16()


@decoder("vendor,widget-v1")
class Widget(Declared):
    """The state of a device, which its driver hands over."""

    version = u32(equals=1)
    nr_rings = u32(at_most=64)
    firmware = text(16)
    mtu = u64(unit="bytes")
    rings = vmalloc(Ring, count="nr_rings")


arena = kho.Arena("64M", scratch="4M,4M,4M")
out = kho.Outgoing(arena, "kho-v4")
buffers = [arena.alloc(order=2) for _ in range(2)]
for buffer in buffers:
    out.preserve_folio(buffer)
rings = [{"pfn": buffer.pfn, "entries": 512, "flags": 1, "cpu": n} for n, buffer in enumerate(buffers)]
out.add_payload(Widget, {"firmware": "4.2", "mtu": 9000, "rings": rings}, file=("widgets", 0x1))
out.finalize()
out.save(sys.argv[1])

widget = kho.open(sys.argv[1]).luo.sessions["widgets"].files[0x1]
print(widget.firmware, widget.mtu, [ring.entries for ring in widget.rings])
print(widget.describe()["rings"][0])
for owner, what, memory in widget.owned():
    print(owner, "|", what, "|", memory)
