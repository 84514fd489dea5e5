"""JSON schemas (2020-12) of the documents that the commands print as JSON, by command.

Each document begins with a member `schema`, `kho-inspect-1`: the command, and the version of its schema. The version is
raised when a member is removed or changes its type or meaning, not when one is added. Next to an integer that a double
cannot hold is a hexadecimal string of the same shape, under the same name with `_hex` (`kho.jsontext`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["COMMANDS", "VERSION", "named", "schema"]

VERSION = 1
"""Version of all schemas."""

Schema = dict[str, Any]
Members = dict[str, Schema]


def named(command: str) -> str:
    """Return what `schema` is in the documents of a command."""
    return f"kho-{command}-{VERSION}"


def schema(command: str) -> Schema:
    """Return the schema of the JSON of a command. Raises: KeyError for a command without one."""
    variants: list[Schema] = []
    shared: Members = {}
    for of in COMMANDS[command]():
        variant = dict(of)
        shared |= variant.pop("$defs", {})
        variant["properties"] = {"schema": {"const": named(command)}, **of["properties"]}
        variant["required"] = ["schema", *of["required"]]
        variants.append(variant)
    body = variants[0] if len(variants) == 1 else {"oneOf": variants}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:kho:schema:{named(command)}",
        "title": f"kho {command} --json",
        **body,
        "$defs": {"hex": HEX, **shared},
    }


# Parts

HEX: Schema = {
    "description": "hexadecimal strings in the shape of the member without _hex; what is no integer is as it is there",
    "type": ["string", "array", "object", "number", "boolean", "null"],
    "items": {"$ref": "#/$defs/hex"},
    "additionalProperties": {"$ref": "#/$defs/hex"},
}


def about(of: Schema, text: str) -> Schema:
    """Describe a schema."""
    return {**of, "description": text}


def obj(required: Members, optional: Members | None = None, text: str = "", *, more: bool = False) -> Schema:
    """Return an object with these members, and others only with `more`."""
    made: Schema = {"type": "object"}
    if text:
        made["description"] = text
    made |= {"properties": {**required, **(optional or {})}, "required": list(required)}
    if not more:
        made |= {"patternProperties": {"_hex$": {"$ref": "#/$defs/hex"}}, "additionalProperties": False}
    return made


def named_by(value: Schema, text: str) -> Schema:
    """Return an object whose members have names of the image, the machine or the files."""
    return {"type": "object", "description": text, "additionalProperties": value}


def among_hex(value: Schema, text: str) -> Schema:
    """Return such an object; its members may have siblings with hexadecimal strings in it."""
    return named_by({"anyOf": [value, {"$ref": "#/$defs/hex"}]}, text)


def array(items: Schema, text: str = "") -> Schema:
    """Return an array of any length."""
    return {"type": "array", **({"description": text} if text else {}), "items": items}


def row(*items: Schema, text: str = "") -> Schema:
    """Return an array with exactly these items."""
    made: Schema = {"type": "array", **({"description": text} if text else {})}
    return {**made, "prefixItems": list(items), "items": False, "minItems": len(items)}


def maybe(of: Schema) -> Schema:
    """Return a schema that also takes null."""
    kind = of.get("type")
    if isinstance(kind, str) and "enum" not in of:
        return {**of, "type": [kind, "null"]}
    return {"anyOf": [of, {"type": "null"}]}


def one_of(*words: str) -> Schema:
    """Return a string that is one of these."""
    return {"type": "string", "enum": list(words)}


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {}
SHARE: Schema = {"type": "number", "minimum": 0}
SIZE = about(COUNT, "bytes")
PHYS = about(COUNT, "physical address")
SHA256: Schema = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
TEXTS = array(TEXT)
AREA = row(PHYS, SIZE)
AREAS = array(AREA, "[physical address, bytes] each")
SEVERITY = one_of("error", "warning", "note")
PAGE_SIZE: Schema = {"enum": [4096, 16384, 65536], "description": "bytes of a page"}
CERTAINTY = one_of("given", "certain", "likely", "guess", "not read")


# Commands


def inspect() -> list[Schema]:
    """`kho inspect`: a handover in memory, or what debugfs shows."""
    memfd: Members = {
        "pos": COUNT,
        "size": SIZE,
        "seals": about(COUNT, "F_SEAL_* bits"),
        "flags": COUNT,
        "nr_folios": COUNT,
        "folios": about(COUNT, "folios that its list names"),
    }
    digest: Members = {
        "sha256": maybe(SHA256),
        "absent": about(TEXT, "why its contents are not in the dump"),
        "error": TEXT,
        "unverified": TEXTS,
        "features": named_by(TEXTS, "names of bits"),
    }
    file = obj(
        {"compatible": TEXT, "data": COUNT, "token": COUNT},
        {
            **memfd,
            **digest,
            "unit": about(TEXT, "systemd's unit"),
            "fd": about(TEXT, "systemd's FDNAME"),
            "draft": FLAG,
        },
        "a file of a session; other members are fields of its kind",
        more=True,
    )
    luo = obj(
        {
            "compatible": TEXT,
            "liveupdate_num": COUNT,
            "sessions": array(obj({"name": TEXT, "count": COUNT, "files": array(file)})),
            "flbs": array(row(TEXT, COUNT, COUNT), "[compatible, data, number of users] each"),
        },
        {
            "flb_data": named_by({"type": "object"}, "FLBs that have a decoder"),
            "features": named_by(TEXTS, "names of bits: supported, required, active"),
        },
        "the live update orchestrator",
    )
    kernel_file = obj(
        {"token": COUNT, "compatible": TEXT, "data": COUNT}, {"size": SIZE, "name": TEXT, "retrieved": FLAG}
    )
    kernel_sessions = array(obj({"name": TEXT, "files": array(kernel_file)}, {"retrieved": FLAG}))
    kernel = obj(
        {"source": TEXT},
        {
            "error": TEXT,
            "release": maybe(TEXT),
            "scratch_phys": PHYS,
            "out_fdt": PHYS,
            "finalized": FLAG,
            "in_fdt": PHYS,
            "previous_release": TEXT,
            "kexec_count": COUNT,
            "scratch": AREAS,
            "sessions": kernel_sessions,
            "incoming_sessions": kernel_sessions,
            "vmcoreinfo_phys": PHYS,
            "problems": TEXTS,
        },
        "what the kernel's own variables tell",
    )
    subtree = obj({"phys": PHYS, "size": maybe(SIZE)}, {**digest, "raw": about(TEXT, "its first bytes, in hex")})
    systemd = obj(
        {},
        {
            "version": COUNT,
            "kexec_count": COUNT,
            "entries": array(
                obj({"unit": TEXT, "name": TEXT, "token": maybe(COUNT), "session": maybe(TEXT)}, more=True)
            ),
            "problems": TEXTS,
            "error": TEXT,
        },
        "systemd's descriptor store",
    )
    live = obj(
        {
            "image": TEXT,
            "version": TEXT,
            "generation": COUNT,
            "objects": array(
                obj(
                    {
                        "name": TEXT,
                        "dtype": maybe(TEXT),
                        "shape": array(COUNT),
                        "phys": PHYS,
                        "nbytes": SIZE,
                        "crc32": maybe(COUNT),
                        "generation": COUNT,
                    }
                )
            ),
        },
        text="an image of kho.live",
    )
    handover = obj(
        {
            "compatible": about(TEXT, "of the root FDT"),
            "kernels": about(TEXT, "the releases that write this"),
            "read_as": about(TEXT, "the ABI that it is read as"),
            "unverified": TEXTS,
            "drafts": TEXTS,
            "page_size": PAGE_SIZE,
            "page_size_why": TEXT,
            "certainty": CERTAINTY,
            "finalized": FLAG,
            "fdt_phys": PHYS,
            "other_fdts": array(PHYS),
            "other_roots": array(obj({"phys": PHYS, "state": TEXT, "why": maybe(TEXT), "kexec_count": maybe(COUNT)})),
            "preserved_memory_map": PHYS,
            "metadata_pages": maybe(COUNT),
            "nr_folios": maybe(COUNT),
            "preserved_bytes": maybe(SIZE),
            "folios_by_order": maybe(named_by(COUNT, "order -> number of folios")),
            "pages_outside": maybe(about(COUNT, "preserved pages that are not in this memory")),
            "subtrees": named_by(subtree, "name -> blob"),
            "malformed_subtrees": named_by(TEXT, "name -> reason"),
        },
        {
            "bitmap_bytes": SIZE,
            "bitmap_bytes_why": TEXT,
            "scratch": AREAS,
            "scratch_phys": maybe(PHYS),
            "scratch_how": maybe(one_of("given", "told", "doubtful", "content", "kho_scratch")),
            "folios": maybe(array(row(PHYS, COUNT), "[physical address, order] each; left out if there are too many")),
            "folios_sha256": maybe(SHA256),
            "map_lost": obj({"phys": PHYS, "why": TEXT}, text="the page of the map that is not in the dump"),
            "folio_runs": array(row(PHYS, COUNT, COUNT), "[physical address, order, number of folios] each"),
            "dump": obj({}, {"release": TEXT, "crash_time": TEXT, "level": COUNT}),
            "absent": obj(
                {
                    "level": maybe(COUNT),
                    "left_out_bytes": SIZE,
                    "cut_off_bytes": SIZE,
                    "cut_files": TEXTS,
                    "preserved_pages_left_out": maybe(COUNT),
                    "preserved_pages_cut_off": maybe(COUNT),
                    "compound_pages_without_their_second": COUNT,
                }
            ),
            "placement": obj(
                {"argument": TEXT, "named": TEXT, "as_is": TEXT, "certainty": CERTAINTY, "why": TEXT},
                text="where a raw image was read, if that is not where it was named",
            ),
            "kho_test": obj(
                {
                    "nr_folios": COUNT,
                    "folios": array(row(PHYS, COUNT)),
                    "csum": COUNT,
                    "csum_holds": {"type": ["boolean", "string"], "description": "a string is why it is not known"},
                }
            ),
            "reserve_mem": named_by(row(PHYS, SIZE), "name -> [start, bytes]"),
            "kexec_metadata": obj({"version": COUNT, "previous_release": TEXT, "kexec_count": COUNT}, more=True),
            "live": live,
            "payloads": named_by({"type": "object"}, "subtrees of other formats, by name"),
            "luo": luo,
            "systemd": systemd,
            "kernel": kernel,
            "unlisted_memfds": array(
                obj({"phys": PHYS, "compatible": TEXT, "in_map": FLAG, **memfd}, digest, "a memfd in no session")
            ),
            "refused_memfds": array(obj({"phys": PHYS, "error": TEXT})),
        },
        "a handover in memory",
    )
    side = maybe(
        obj(
            {
                "fdt_bytes": maybe(SIZE),
                "compatible": maybe(TEXT),
                "preserved_memory_map": maybe(PHYS),
                "sub_fdts": named_by(obj({"size": SIZE, "sha256": SHA256}), "name -> blob"),
            },
            {
                "truncated": obj({"totalsize": SIZE, "size": SIZE}),
                "problem": TEXT,
                "missing": about(TEXT, "why there is no FDT"),
            },
        )
    )
    debugfs = obj(
        {"kind": TEXT, "path": TEXT, "in": side, "out": side},
        {"version": TEXT, "cmdline": TEXT, "finalized": FLAG, "scratch": AREAS, "ram": AREAS},
        "what debugfs shows",
    )
    return [handover, debugfs]


def owners() -> list[Schema]:
    """`kho owners`."""
    owned: Members = {
        "phys": PHYS,
        "nbytes": SIZE,
        "orders": array(COUNT, "orders of the folios; empty for pages that are not preserved"),
        "owner": TEXT,
        "what": about(TEXT, "the part of the owner"),
        "offset": maybe(about(COUNT, "bytes from the beginning of the owner's file or area")),
    }
    rows = array(obj(owned, {"left_out": SIZE, "cut_off": SIZE}))
    who = row(TEXT, TEXT, text="[owner, part]")
    return [
        obj(
            {
                "compatible": TEXT,
                "read_as": TEXT,
                "unverified": TEXTS,
                "preserved_bytes": maybe(SIZE),
                "totals": named_by(SIZE, "owner -> bytes"),
                "why_unowned": maybe(TEXT),
                "unpreserved": array(obj(owned)),
                "shared": array(obj({"phys": PHYS, "nbytes": SIZE, "first": who, "second": who})),
                "unlisted_memfds": array(obj({"phys": PHYS, "compatible": TEXT, "size": SIZE, "in_map": FLAG})),
                "refused_memfds": array(obj({"phys": PHYS, "error": TEXT})),
                "rows": rows,
            },
            {"more_unpreserved": COUNT, "more_shared": COUNT, "more_rows": COUNT},
            "of a handover in memory",
        ),
        obj({"source": {"const": "debugfs"}, "why": TEXT, "rows": array(obj(owned))}, text="of what debugfs shows"),
    ]


def verify() -> list[Schema]:
    """`kho verify`, `--list` and `--fleet`."""
    finding: Members = {"id": TEXT, "severity": SEVERITY, "place": TEXT, "value": TEXT, "phys": maybe(PHYS)}
    rule: Members = dict.fromkeys(("id", "title", "means", "matters", "advice", "source"), TEXT)
    return [
        obj(
            {
                "sources": TEXTS,
                "counts": obj({"error": COUNT, "warning": COUNT, "note": COUNT}),
                "findings": array(obj({**finding, "title": TEXT})),
            },
            {"looked_at": named_by(TEXT, "path -> what was read of it")},
            "findings",
        ),
        obj({"rules": array(obj({**rule, "severity": SEVERITY}))}, text="with --list"),
        obj(
            {
                "source": TEXT,
                "exit_code": COUNT,
                "error": maybe(TEXT),
                "errors": maybe(COUNT),
                "warnings": maybe(COUNT),
                "notes": maybe(COUNT),
                "ids": maybe(TEXTS),
                "findings": maybe(array(obj(finding))),
                "findings_left_out": maybe(COUNT),
            },
            text="a line of --fleet",
        ),
    ]


def doctor() -> list[Schema]:
    """`kho doctor`, of one directory or of several, `--list` and `--fleet`."""
    finding = obj(
        {
            "id": TEXT,
            "severity": SEVERITY,
            "title": TEXT,
            "value": TEXT,
            "certainty": TEXT,
            "evidence": array(obj({"file": TEXT, "line": maybe(COUNT), "text": TEXT})),
            "remedy": TEXT,
        }
    )
    unread = array(obj({"file": TEXT, "why": TEXT}), "files that could not be read")
    texts = dict.fromkeys(("root", "headline", "scratch_how", "crash_dumps", "crash_dumps_why"), TEXT)
    sizes = ("ram", "scratch", "scratch_low", "scratch_high", "leftover", "cma_total", "hugetlb", "reserved_at_boot")
    report: Members = {
        **texts,
        "crash_dumps_needs": TEXT,
        "state": one_of("active", "failed", "off", "absent", "unknown"),
        **{name: maybe(TEXT) for name in ("release", "boot", "previous_release", "cmdline", "layout", "folder")},
        **{name: maybe(SIZE) for name in (*sizes, "crash_kernel")},
        **{name: maybe(FLAG) for name in ("built_in", "rounds_sizes", "numa", "enabled_by_default")},
        **{name: maybe(COUNT) for name in ("kexec_count", "scale")},
        **dict.fromkeys(("page_size", "pageblock", "alignment", "crash_wanted"), SIZE),
        "by_node": named_by(SIZE, "NUMA node -> bytes of scratch"),
        "nodes": named_by(SIZE, "NUMA node -> bytes of RAM"),
        "preserved": array(obj({"direction": one_of("in", "out"), "name": TEXT}, {"bytes": maybe(SIZE)})),
        "platforms": TEXTS,
        "container": FLAG,
        "looked": TEXTS,
        "elsewhere": TEXTS,
        "share": maybe(SHARE),
        "exit_code": COUNT,
        "areas": array(obj({"kind": TEXT, "phys": maybe(PHYS), "bytes": SIZE, "node": maybe(COUNT)})),
        "findings": array(finding),
        "unread": unread,
    }
    what_if = obj(
        {
            "parameters": TEXT,
            "accepted": FLAG,
            **{name: maybe(FLAG) for name in ("fits", "boots", "crash_kernel")},
            "now": maybe(SIZE),
            "then": maybe(SIZE),
            "exact": FLAG,
            "sizes": array(SIZE),
            "notes": TEXTS,
            "unknown": TEXTS,
            "gain": maybe({"type": "integer"}),
            "headline": TEXT,
        }
    )
    rule = dict.fromkeys(("id", "title", "means", "matters", "advice", "case", "source", "known", "helped"), TEXT)
    fleet_texts = ("headline", "release", "state", "boot", "scratch_how")
    crash = ("crash_dumps", "crash_dumps_needs", "crash_dumps_why")
    fleet = obj(
        {
            "source": TEXT,
            "exit_code": COUNT,
            "error": maybe(TEXT),
            **{name: maybe(TEXT) for name in (*fleet_texts, *crash)},
            **{name: maybe(SIZE) for name in ("ram", "scratch", "leftover", "cma_total", "hugetlb")},
            "share": maybe(SHARE),
            "ids": maybe(TEXTS),
            "findings": maybe(array(finding)),
            "findings_left_out": maybe(COUNT),
            "unread": maybe(unread),
        },
        text="a line of --fleet",
    )
    return [
        obj(report, {"what_if": what_if}, "of one machine"),
        obj({"reports": array(obj(report, {"what_if": what_if}))}, text="of several directories"),
        obj({"rules": array(obj({**rule, "severity": SEVERITY}))}, text="with --list"),
        fleet,
    ]


def compat() -> list[Schema]:
    """`kho compat`: of a handover, of two kernels, and `--matrix`."""
    from ..handover.compat import VERDICTS

    verdict = one_of(*VERDICTS)
    judged = array(obj({"object": TEXT, "verdict": verdict, "why": TEXT, "source": TEXT}))
    target = obj(
        {
            "target": maybe(about(TEXT, "path of the kernel's file")),
            "release": TEXT,
            "verdict": verdict,
            "objects": judged,
            "notes": array(obj({"kernel": TEXT, "note": TEXT})),
        }
    )
    fault = obj(
        {"affects": row(FLAG, FLAG), "effect": TEXT, "fixed": TEXT, "upstream": maybe(TEXT), "remedy": maybe(TEXT)}
    )
    both = row(ANY, ANY, text="of the first kernel, and of the second")
    return [
        obj({"handover": TEXTS, "targets": array(target)}, text="of a handover"),
        obj(
            {
                "kernels": row(TEXT, TEXT),
                "differences": among_hex(both, "what differs between the releases"),
                "configured": among_hex(both, "what differs between the kernels' files"),
                "files": row(maybe(TEXT), maybe(TEXT)),
                "releases": row(TEXT, TEXT),
                "faults": named_by(fault, "faults of one of them"),
            },
            text="of two kernels",
        ),
        obj({"matrix": named_by(named_by(judged, "to -> verdicts"), "from -> to")}, text="with --matrix"),
    ]


def diff() -> list[Schema]:
    """`kho diff`."""
    both = row(ANY, ANY, text="in A, and in B")
    change = obj(
        {
            "kind": TEXT,
            "name": TEXT,
            "side": one_of("added", "removed", "changed"),
            "facts": among_hex(both, "what differs"),
            "content": maybe(
                obj(
                    {
                        "offset": about(COUNT, "of the first difference"),
                        "nbytes": SIZE,
                        "sha256": row(maybe(SHA256), maybe(SHA256)),
                    }
                )
            ),
        }
    )
    extents = array(row(PHYS, COUNT, COUNT), "[physical address or pfn, number, bytes] each")
    return [
        obj(
            {
                "different": FLAG,
                "page_size": PAGE_SIZE,
                "facts": among_hex(both, "ABI, sizes, addresses"),
                "scratch": maybe(row(maybe(AREAS), maybe(AREAS))),
                "folios": array(
                    obj({"order": COUNT, "only_a": extents, "only_b": extents}, {"more_a": COUNT, "more_b": COUNT})
                ),
                "subtrees": array(change),
                "sessions": array(change),
                "files": array(change),
                "reserve_mem": array(change),
            },
            {"uncompared": TEXTS},
        )
    ]


def extract() -> list[Schema]:
    """`kho extract`: one item, or the manifest of --all."""
    item: Members = {
        "kind": one_of("subtree", "reserve_mem", "file", "memfd", "folio", "sessions", "pstore"),
        "name": TEXT,
        "phys": maybe(PHYS),
        "size": maybe(SIZE),
        "path": maybe(TEXT),
        "data_bytes": maybe(about(COUNT, "bytes without holes")),
        "sha256": maybe(SHA256),
    }
    missing = array(
        {"type": "array", "prefixItems": [COUNT, SIZE], "minItems": 2}, "[offset, bytes] of what the dump lacks"
    )
    facts: Members = {
        **dict.fromkeys(("token", "pos", "seals", "flags", "nr_folios", "folios", "order", "records"), COUNT),
        **dict.fromkeys(("session", "compatible", "unit", "fd"), TEXT),
        "in_map": FLAG,
        "draft": FLAG,
        "missing": missing,
        "error": TEXT,
    }
    one = obj(item, facts, "one item; other members are fields of its kind", more=True)
    manifest = obj(
        {
            "compatible": TEXT,
            "read_as": TEXT,
            "unverified": TEXTS,
            "page_size": PAGE_SIZE,
            "fdt_phys": PHYS,
            "entries": array(one),
        },
        text="with --all; also the content of manifest.json, which has no member schema",
    )
    return [one, manifest]


def fdt() -> list[Schema]:
    """`kho fdt`: one devicetree, or several."""
    prop = obj(
        {
            "name": maybe(TEXT),
            "type": one_of("empty", "u32", "u64", "cells", "strings", "bytes"),
            "value": {"type": ["integer", "string", "array", "null"]},
            "raw": about(TEXT, "in hex"),
        },
        {"note": TEXT, "likely_name": maybe(TEXT)},
    )
    node = obj({"name": TEXT, "properties": array(prop), "children": array({"$ref": "#/$defs/node"})})
    tree: Members = {
        "totalsize": SIZE,
        "version": COUNT,
        "boot_cpuid": COUNT,
        "numbers": one_of("native", "cells"),
        "reservations": array({"type": ["array", "object"]}),
        "root": {"$ref": "#/$defs/node"},
    }
    optional = {"error": about(TEXT, "why it is incomplete")}
    made = [
        obj(tree, optional, "one devicetree"),
        obj({"trees": named_by(obj(tree, optional), "title -> devicetree")}, text="several devicetrees"),
    ]
    for variant in made:
        variant["$defs"] = {"node": node}
    return made


def memmap() -> list[Schema]:
    """`kho map`."""
    span = obj(
        {
            "kind": TEXT,
            "owner": TEXT,
            "intervals": array(row(PHYS, about(COUNT, "the first address after it"))),
        }
    )
    return [obj({"page_size": PAGE_SIZE, "totals": named_by(SIZE, "kind -> bytes"), "spans": array(span)})]


def convert() -> list[Schema]:
    """`kho convert`."""
    return [
        obj(
            {
                "path": TEXT,
                "compatible": TEXT,
                "bitmap_bytes": maybe(SIZE),
                "luo": TEXT,
                "losses": TEXTS,
                "fdt_phys": PHYS,
                "nr_folios": COUNT,
                "preserved_bytes": SIZE,
                "segments": array(obj({"phys": PHYS, "nbytes": SIZE, "filesz": SIZE})),
            }
        )
    ]


def _plan() -> Members:
    speeds = named_by(array(NUMBER), "layout -> coefficients")
    cost = obj(
        {
            **dict.fromkeys(("layout", "abi", "kernels"), TEXT),
            "page_size": PAGE_SIZE,
            **dict.fromkeys(("bitmaps", "bitmap_bytes", "nodes", "node_bytes", "fdt_bytes"), COUNT),
            "directory_bytes": SIZE,
            "deviation": NUMBER,
            "serialize_s": maybe(NUMBER),
            "take_over_s": maybe(NUMBER),
            "exact": FLAG,
            "nbytes": NUMBER,
            "pages": NUMBER,
        }
    )
    scratch = obj(
        {
            "value": TEXT,
            "reserved": maybe(array(SIZE)),
            "estimated": FLAG,
            "sizes": named_by(array(SIZE), "page size -> bytes of each area"),
            "aligned": named_by(SIZE, "page size -> what sizes are rounded up to"),
            "rounds_all": FLAG,
            "left": named_by({"type": "integer"}, "page size -> bytes of memory left"),
        }
    )
    return {
        "memory": SIZE,
        "nr_folios": COUNT,
        "preserved": SIZE,
        "zones": array(obj({"start": PHYS, "slots": COUNT, "count": COUNT, "size": SIZE, "random": FLAG})),
        "costs": array(cost),
        "left_out": named_by(TEXT, "impossible rows -> reason"),
        "scratch": scratch,
        "calibration": maybe(obj({"serialize": speeds, "take_over": speeds}, more=True)),
    }


def plan() -> list[Schema]:
    """`kho plan`."""
    return [obj(_plan())]


def simulate() -> list[Schema]:
    """`kho simulate`."""
    return [
        obj(
            {
                "plan": obj(_plan()),
                "pages": COUNT,
                "nbytes": SIZE,
                "nr_folios": COUNT,
                "as_planned": FLAG,
                "seconds": named_by(NUMBER, "step -> seconds"),
                "peak_rss": SIZE,
                "page_faults": COUNT,
                "kept": maybe(TEXT),
            }
        )
    ]


def ps() -> list[Schema]:
    """`kho ps`."""
    image = obj(
        {
            **dict.fromkeys(("name", "state", "transport", "version", "command"), TEXT),
            **dict.fromkeys(("uid", "generation", "objects"), COUNT),
            "pid": maybe(COUNT),
            "used": SIZE,
            "size": SIZE,
            "since": about(NUMBER, "seconds since the epoch"),
            "child": maybe(COUNT),
            "age": maybe(about(NUMBER, "seconds")),
        }
    )
    return [obj({"images": array(image)})]


def release() -> list[Schema]:
    """`kho release`."""
    return [obj({"name": TEXT, "freed": SIZE})]


COMMANDS: dict[str, Callable[[], list[Schema]]] = {
    "compat": compat,
    "convert": convert,
    "diff": diff,
    "doctor": doctor,
    "extract": extract,
    "fdt": fdt,
    "inspect": inspect,
    "map": memmap,
    "owners": owners,
    "plan": plan,
    "ps": ps,
    "release": release,
    "simulate": simulate,
    "verify": verify,
}
"""Command -> the schemas of its documents."""
