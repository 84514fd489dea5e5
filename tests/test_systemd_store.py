"""systemd's descriptor store in LUO: what inspect, owners, extract and verify say of it, whatever its JSON is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kho
from kho.formats.systemd import MOST_BYTES, MOST_PROBLEMS, FdStore
from kho.handover.describe import describe
from kho.handover.owners import owners
from kho.handover.verify import verify

from bounded import bounded
from command import kho as run

AS_RUN = (
    '{"version":1,"state":{"KExecCount":2,"ShutdownStartTimestamp":{"realtime":1796019264786618,"monotonic":190786623},'
    '"ShutdownFinishTimestamp":{"realtime":1796019271287426,"monotonic":197287426},"ShutdownLateStartTimestamp":'
    '{"realtime":1796019272464582,"monotonic":198464775},"ShutdownLateFinishTimestamp":{"realtime":1796019276729570,'
    '"monotonic":202729577}},"units":{"x-sess.service":{"fdstore":[{"type":"luo_session","name":"sess","sessionName":'
    '"mysess"}]},"x-yes.service":{"fdstore":[{"type":"fd","name":"img","token":1}]},"x-pipe.service":{"fdstore":'
    '[{"type":"fd","name":"noexec","token":2},{"type":"fd","name":"empty","token":3},{"type":"fd","name":"img","token":4},'
    '{"type":"fd","name":"otmpfile","token":5}]}}}'
)
"""Token 0 as systemd 262.1 wrote it at its third kexec, with fewer units."""
CONTENTS = {1: b"\x11" * 65536, 2: b"noexec", 3: b"", 4: b"image", 5: b"o" * 5000}


def handover(document: bytes | str, abi: str = "kho-v4", *, linked: str = "mysess") -> kho.Arena:
    """The store of a machine: token 0 is the map, 1 to 5 are memfds; and a LUO session that a unit keeps."""
    arena = kho.Arena("32M")
    out = kho.Outgoing(arena, abi)
    raw = document.encode() if isinstance(document, str) else document
    seals = {"seals": 0x3F} if abi == "kho-v4" else {}
    out.add_memfd("systemd", 0, raw, **seals)
    for token, contents in CONTENTS.items():
        out.add_memfd("systemd", token, contents)
    out.add_memfd(linked, 7, b"of the session")
    out.add_memfd("vm-1", 1, b"not systemd's")
    out.finalize()
    return arena


def changed(change: Callable[[dict[str, Any]], object]) -> str:
    document = json.loads(AS_RUN)
    change(document)
    return json.dumps(document)


def store(document: bytes | str) -> FdStore:
    found = kho.open(handover(document)).luo.fd_store
    assert found is not None
    return found


# As run


@pytest.mark.parametrize("abi", ["kho-v1", "kho-v4"])
def test_each_file_of_the_store_has_its_unit_and_descriptor(abi: str) -> None:
    inc = kho.open(handover(AS_RUN, abi))
    luo = inc.luo
    found = luo.fd_store
    assert found is not None
    assert (found.version, found.kexec_count, found.problems) == (1, 2, [])
    assert luo.sessions["systemd"].fd_store.document == json.loads(AS_RUN)
    named = {token: (s.unit, s.name) for token in CONTENTS if (s := luo.sessions["systemd"].files.stored(token))}
    assert named == {
        1: ("x-yes.service", "img"),
        2: ("x-pipe.service", "noexec"),
        3: ("x-pipe.service", "empty"),
        4: ("x-pipe.service", "img"),
        5: ("x-pipe.service", "otmpfile"),
    }
    (linked,) = (entry for entry in found.entries if entry.session is not None)
    assert (linked.unit, linked.name, linked.session, linked.token) == ("x-sess.service", "sess", "mysess", None)
    assert luo.sessions["systemd"].files.stored(0) is None
    assert luo.sessions["vm-1"].files.stored(1) is None
    assert [f.id for f in verify(inc) if f.severity != "note"] == []


def test_inspect_shows_the_store(tmp_path: Path) -> None:
    path = tmp_path / "dump.elf"
    kho.Image.of_arena(handover(AS_RUN)).save(path)
    out = run("inspect", path).out
    assert "systemd: descriptor store, KExecCount 2" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["x-yes.service", "img", "file", "0x1"] in lines
    assert ["x-sess.service", "sess", "session", "mysess"] in lines
    report = run("inspect", "--json", path).json
    assert report["systemd"]["kexec_count"] == 2
    assert report["systemd"]["problems"] == []
    assert report["systemd"]["entries"][0] == {
        "unit": "x-sess.service",
        "name": "sess",
        "token": None,
        "session": "mysess",
    }
    files = {s["name"]: s["files"] for s in report["luo"]["sessions"]}
    assert [(f.get("unit"), f.get("fd")) for f in files["systemd"]][:2] == [(None, None), ("x-yes.service", "img")]
    assert [(f["unit"], f["fd"]) for f in files["mysess"]] == [("x-sess.service", "sess")]
    assert "unit" not in files["vm-1"][0]


def test_owners_and_extract_name_unit_and_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "dump.elf"
    kho.Image.of_arena(handover(AS_RUN)).save(path)
    done = run("owners", path)
    assert done.code == 0
    assert "session systemd, file 0x1 (img of x-yes.service): data at 0x0" in done.out
    assert "session mysess, file 0x7 (sess of x-sess.service): data at 0x0" in done.out
    assert "session vm-1, file 0x1: data at 0x0" in done.out
    assert "session systemd, file 0x0: data at 0x0" in done.out
    totals = run("owners", "--json", path).json["totals"]
    assert totals["session systemd, file 0x1 (img of x-yes.service)"] >= 65536
    done = run("extract", path, "--all", tmp_path / "out", "--json")
    assert done.code == 0
    entries = {entry["name"]: entry for entry in done.json["entries"]}
    assert (entries["systemd/0x4"]["unit"], entries["systemd/0x4"]["fd"]) == ("x-pipe.service", "img")
    assert (entries["mysess/0x7"]["unit"], entries["mysess/0x7"]["fd"]) == ("x-sess.service", "sess")
    assert "unit" not in entries["vm-1/0x1"]
    assert (tmp_path / "out" / entries["systemd/0x4"]["path"]).read_bytes() == b"image"
    done = run("extract", path, "--session", "systemd", "--token", "1", "-o", tmp_path / "img", "--json")
    assert (done.json["unit"], done.json["fd"]) == ("x-yes.service", "img")
    assert "(img of x-yes.service)" in done.err


def test_a_handover_without_the_session_has_no_store() -> None:
    arena = kho.Arena("8M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("vm-1", 0, AS_RUN.encode())
    out.finalize()
    inc = kho.open(arena)
    assert (inc.luo.fd_store, inc.luo.fd_store_error) == (None, None)
    assert "systemd" not in describe(inc)
    with pytest.raises(kho.NotFoundError, match="session vm-1: no fd-store map"):
        _ = inc.luo.sessions["vm-1"].fd_store


# Not as systemd writes it

PROBLEMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version 2": (lambda d: d.update(version=2), "version is 2, not 1"),
    "version as text": (lambda d: d.update(version="1"), "version is '1', not 1"),
    "version true": (lambda d: d.update(version=True), "version is True, not 1"),
    "no version": (lambda d: d.pop("version"), "version is missing, not 1"),
    "count -1": (lambda d: d["state"].update(KExecCount=-1), "KExecCount is -1, not a number of kexecs"),
    "count 2^64": (lambda d: d["state"].update(KExecCount=2**64), f"KExecCount is {2**64}, not a number of kexecs"),
    "count 10^999": (lambda d: d["state"].update(KExecCount=10**999), "KExecCount is a huge number, not a number"),
    "count as list": (lambda d: d["state"].update(KExecCount=[]), "KExecCount is a list, not a number of kexecs"),
    "state as list": (lambda d: d.update(state=[1]), "state is a list, not an object"),
    "units as text": (lambda d: d.update(units="x"), "units is 'x', not an object"),
    "unit as number": (lambda d: d["units"].update(u=3), "unit 'u' is 3, not an object"),
    "store as object": (lambda d: d["units"].update(u={"fdstore": {}}), "unit 'u': fdstore is an object, not a list"),
    "entry as text": (lambda d: d["units"].update(u={"fdstore": ["fd"]}), "unit 'u', entry 0 is 'fd', not an object"),
    "type unknown": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "pidfd", "name": "p"}]}),
        "unit 'u', entry 0: type is 'pidfd', not fd or luo_session",
    ),
    "no token": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p"}]}),
        "unit 'u', entry 0: token is missing, not a token",
    ),
    "token as text": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p", "token": "1"}]}),
        "unit 'u', entry 0: token is '1', not a token",
    ),
    "token 1.0": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p", "token": 1.0}]}),
        "unit 'u', entry 0: token is 1.0, not a token",
    ),
    "token there is not": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p", "token": 99}]}),
        "p of u: token 0x63 is not in this handover",
    ),
    "token of the map": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p", "token": 0}]}),
        "p of u: token 0x0 is the map itself",
    ),
    "token twice": (
        lambda d: d["units"].update(u={"fdstore": [{"type": "fd", "name": "p", "token": 1}]}),
        "p of u: token 0x1 is there twice",
    ),
    "session there is not": (
        lambda d: d["units"]["x-sess.service"]["fdstore"][0].update(sessionName="gone"),
        "sess of x-sess.service: session 'gone' is not in this handover",
    ),
    "session as number": (
        lambda d: d["units"]["x-sess.service"]["fdstore"][0].update(sessionName=5),
        "unit 'x-sess.service', entry 0: sessionName is 5, not text",
    ),
    "name as null": (
        lambda d: d["units"]["x-yes.service"]["fdstore"][0].update(name=None),
        "unit 'x-yes.service', entry 0: name is missing, not text",
    ),
    "file in no store": (
        lambda d: d["units"].pop("x-yes.service"),
        "token 0x1 is in the session, but in no unit's store",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_each_problem_is_named_and_the_rest_is_shown(name: str) -> None:
    change, problem = PROBLEMS[name]
    inc = kho.open(handover(changed(change)))
    found = inc.luo.fd_store
    assert found is not None
    assert any(text.startswith(problem) for text in found.problems), found.problems
    if not name.startswith("units"):
        named = inc.luo.sessions["systemd"].files.stored(4)
        assert named is not None
        assert (named.unit, named.name) == ("x-pipe.service", "img")
    findings = [f for f in verify(inc) if f.id == "KHO045"]
    assert [f.value for f in findings] == sorted(found.problems)
    assert {f.severity for f in findings} == {"warning"}


def test_a_key_that_is_there_twice_is_named() -> None:
    twice = AS_RUN.replace('"units":{', '"units":{"x-yes.service":{"fdstore":[]},', 1)
    found = store(twice)
    assert found.problems == ["the key 'x-yes.service' is there twice in one object; the last one counts"]
    assert found.by_token[1].unit == "x-yes.service"


NO_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "invalid JSON: Expecting value"),
    "cut": (AS_RUN.encode()[:200], "invalid JSON: "),
    "NaN": (b'{"version":NaN}', "invalid JSON: NaN is not JSON"),
    "not UTF-8": (b'{"version":"\xff"}', "invalid JSON: 'utf-8' codec"),
    "BOM": (b"\xef\xbb\xbf{}", "invalid JSON: "),
    "two documents": (b"{}{}", "invalid JSON: Extra data"),
    "deep lists": (b"[" * 200_000, "its JSON is nested too deeply"),
    "deep objects": (b'{"a":' * 100_000, "its JSON is nested too deeply"),
    "a number of many digits": (b'{"version":' + b"9" * 100_000 + b"}", "invalid JSON: Exceeds the limit"),
    "large": (b" " * MOST_BYTES + b"{}", f"{MOST_BYTES + 2} bytes are no map; the limit is {MOST_BYTES}"),
}


@pytest.mark.parametrize("name", NO_JSON)
def test_what_is_no_map_is_named_and_the_files_are_shown(name: str, tmp_path: Path) -> None:
    data, error = NO_JSON[name]
    path = tmp_path / "dump.elf"
    kho.Image.of_arena(handover(data)).save(path)
    with bounded(2.0):
        inc = kho.open(path)
        report = describe(inc)
    assert report["systemd"]["error"].startswith(f"session systemd, file 0x0: {error}")
    assert inc.luo.sessions["systemd"].files[4].read() == b"image"
    assert [f.id for f in verify(inc) if f.severity != "note"] == ["KHO045"]
    assert "systemd: the map of the descriptor store cannot be read: " in run("inspect", path).out
    assert run("owners", path).code == 0


def test_a_map_of_another_kind_is_an_error_and_a_hole_is_not_read() -> None:
    arena = kho.Arena("8M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_file("systemd", 0, "vendor-v1", 0)
    out.finalize()
    luo = kho.open(arena).luo
    assert luo.fd_store is None
    assert luo.fd_store_error == "session systemd, file 0x0: the map is a 'vendor-v1', not a memfd"
    arena = kho.Arena("8M")
    out = kho.Outgoing(arena, "kho-v4")
    out.add_memfd("systemd", 0, b"{}", size=1 << 62)
    out.finalize()
    luo = kho.open(arena).luo
    assert luo.fd_store is None
    assert str(1 << 62) in str(luo.fd_store_error)


def test_problems_without_end_are_counted() -> None:
    entries = [{"type": "fd", "name": "n", "token": 1000 + n} for n in range(2000)]
    found = store(changed(lambda d: d["units"].update(u={"fdstore": entries})))
    assert len(found.problems) == MOST_PROBLEMS + 1
    assert found.problems[-1] == f"and {2000 - MOST_PROBLEMS} more problems"
    with bounded(2.0):
        long = store(json.dumps({"version": 1, "units": {"u" * 400_000: {"fdstore": [1] * 200_000}}}))
    assert len(long.problems) == MOST_PROBLEMS + 1
    assert all(len(problem) < 300 for problem in long.problems)


def test_names_cannot_forge_lines(tmp_path: Path) -> None:
    name = "a\n\x1b[31mb\u202e\ud800" + "c" * 5000
    path = tmp_path / "dump.elf"
    document = changed(lambda d: d["units"].update({name: {"fdstore": [{"type": "fd", "name": name, "token": 1}]}}))
    kho.Image.of_arena(handover(document)).save(path)
    for command in (["inspect"], ["owners"], ["verify"], ["inspect", "--json"], ["owners", "--json"]):
        done = run(*command, path)
        assert done.code in (0, 1)
        assert not any(char in done.out for char in "\x1b\u202e\ud800")
        assert all(len(line) < 20_000 for line in done.out.splitlines() if "--json" not in command)


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 9),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
        st.sampled_from(["fd", "luo_session", "mysess", "systemd", "img"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(
                st.sampled_from(
                    ["version", "state", "KExecCount", "units", "fdstore", "type", "name", "token", "sessionName", "u"]
                ),
                st.text(max_size=4),
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=30,
)
ENTRY = st.fixed_dictionaries({}, optional={"type": JSON, "name": JSON, "token": JSON, "sessionName": JSON})
DOCUMENT = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {
            "units": st.dictionaries(
                st.text(max_size=4), st.fixed_dictionaries({"fdstore": st.lists(ENTRY, max_size=5)})
            )
        },
        optional={"version": JSON, "state": JSON},
    ),
)


@settings(max_examples=200)
@given(DOCUMENT)
def test_any_json_is_described_or_named(document: Any) -> None:
    found = FdStore(json.dumps(document).encode())
    found.check({0, 1, 2}, {"systemd", "mysess"})
    json.dumps(found.describe())
    for entry in found.entries:
        assert (entry.token is None) != (entry.session is None)
        assert isinstance(entry.unit, str)
        assert isinstance(entry.name, str)
    as_written = document == {"version": 1, "state": {}, "units": {}}
    assert found.problems or as_written or found.version == 1


@settings(max_examples=25)
@given(DOCUMENT)
def test_any_json_in_a_handover_breaks_no_command(document: Any) -> None:
    inc = kho.open(handover(json.dumps(document)))
    json.dumps(describe(inc))
    owners(inc)
    verify(inc)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_map_or_an_error(data: bytes) -> None:
    try:
        FdStore(data)
    except kho.FormatError as error:
        assert len(str(error)) < 200
