"""systemd's descriptor store in LUO (systemd 261 and later; abi.md section 6).

systemd-shutdown preserves the descriptors of units with FileDescriptorStorePreserve= in a session named `systemd`.
Token 0 is a memfd with JSON that names unit and descriptor of every other token, and LUO sessions that units keep in
the store:

    {"version": 1, "state": {"KExecCount": 2, ...},
     "units": {UNIT: {"fdstore": [{"type": "fd", "name": FDNAME, "token": 1},
                                  {"type": "luo_session", "name": FDNAME, "sessionName": SESSION}]}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeGuard

from ..errors import FormatError

__all__ = ["MAP_TOKEN", "SESSION_NAME", "FdStore", "Stored"]

SESSION_NAME = "systemd"
"""The session of systemd."""
MAP_TOKEN = 0
"""The token of the map."""
VERSION = 1
MOST_BYTES = 1 << 20
"""Maximum size of the map: some ten thousand descriptors."""
MOST_PROBLEMS = 16
"""Maximum number of problems that are listed one by one."""


class Stored(NamedTuple):
    """An entry of a unit's store."""

    unit: str
    name: str
    """FDNAME of the descriptor."""
    token: int | None
    """Its token in the session `systemd`; None for a LUO session."""
    session: str | None
    """The name of a LUO session; None for a descriptor."""

    @property
    def label(self) -> str:
        """Format unit and name: `img of x.service`."""
        return f"{_cut(self.name)} of {_cut(self.unit)}"


class FdStore:
    """The map of a descriptor store, and what in it is not as systemd writes it."""

    def __init__(self, data: bytes) -> None:
        self.document: Any = _parse(data, repeated := _Repeated())
        """The JSON as it was read."""
        self.version: int | None = None
        self.kexec_count: int | None = None
        """KExecCount of the kernel that wrote the map: the number of kexecs in a row that brought the store along."""
        self.entries: list[Stored] = []
        self._problems: list[str] = []
        self._more = 0
        for key in repeated.keys:
            self._problem(f"the key {key!r} is there twice in one object; the last one counts")
        self._read(self.document)
        self.by_token = _first((entry.token, entry) for entry in self.entries if entry.token is not None)
        """Descriptors by token; for a duplicate token, the first one."""
        self.by_session = _first((entry.session, entry) for entry in self.entries if entry.session is not None)
        """Linked sessions by their names in LUO."""

    @property
    def problems(self) -> list[str]:
        """What is not as systemd writes it, at most 16 problems and then the number of others."""
        return [*self._problems, f"and {self._more} more problems"] if self._more else self._problems

    def _problem(self, what: str) -> None:
        if len(self._problems) < MOST_PROBLEMS:
            self._problems.append(what)
        else:
            self._more += 1

    def check(self, tokens: set[int], sessions: set[str]) -> None:
        """Compare the map with the tokens of its session and with the sessions in LUO, and record what is missing."""
        seen: set[int | str] = set()
        for entry in self.entries:
            key: int | str = entry.token if entry.token is not None else entry.session or ""
            what = f"token {key:#x}" if isinstance(key, int) else f"session {key!r}"
            if key in seen:
                self._problem(f"{entry.label}: {what} is there twice")
            elif key == MAP_TOKEN:
                self._problem(f"{entry.label}: {what} is the map itself")
            elif key not in (tokens if isinstance(key, int) else sessions):
                self._problem(f"{entry.label}: {what} is not in this handover")
            seen.add(key)
        for token in sorted(tokens - {MAP_TOKEN} - self.by_token.keys()):
            self._problem(f"token {token:#x} is in the session, but in no unit's store")

    def _read(self, document: Any) -> None:
        top = self._object(document, "the map")
        version = top.get("version")
        if _is_int(version):
            self.version = version
        if version != VERSION or not _is_int(version):
            self._problem(f"version is {_shown(version)}, not {VERSION}")
        count = self._object(top.get("state", {}), "state").get("KExecCount")
        if _is_int(count) and 0 <= count < 1 << 64:
            self.kexec_count = count
        elif count is not None:
            self._problem(f"KExecCount is {_shown(count)}, not a number of kexecs")
        for unit, found in self._object(top.get("units", {}), "units").items():
            what = f"unit {_shown(unit)}"
            store = self._object(found, what).get("fdstore", [])
            if not isinstance(store, list):
                self._problem(f"{what}: fdstore is {_shown(store)}, not a list")
                continue
            for place, entry in enumerate(store):
                self._entry(unit, entry, f"{what}, entry {place}")

    def _entry(self, unit: str, found: Any, place: str) -> None:
        if not isinstance(found, dict):
            self._problem(f"{place} is {_shown(found)}, not an object")
            return
        kind, name = found.get("type"), found.get("name")
        if not isinstance(name, str):
            self._problem(f"{place}: name is {_shown(name)}, not text")
            name = ""
        if kind == "fd":
            token = found.get("token")
            if not _is_int(token) or not 0 <= token < 1 << 64:
                self._problem(f"{place}: token is {_shown(token)}, not a token")
                return
            self.entries.append(Stored(unit, name, token, None))
        elif kind == "luo_session":
            session = found.get("sessionName")
            if not isinstance(session, str):
                self._problem(f"{place}: sessionName is {_shown(session)}, not text")
                return
            self.entries.append(Stored(unit, name, None, session))
        else:
            self._problem(f"{place}: type is {_shown(kind)}, not fd or luo_session")

    def _object(self, value: Any, what: str) -> Mapping[str, Any]:
        if isinstance(value, dict):
            return value
        self._problem(f"{what} is {_shown(value)}, not an object")
        return {}

    def describe(self) -> dict[str, Any]:
        """Return version, KExecCount, the entries of each unit, and the problems, for JSON."""
        return {
            "version": self.version,
            "kexec_count": self.kexec_count,
            "entries": [entry._asdict() for entry in self.entries],
            "problems": self.problems,
        }


class _Repeated:
    """Keys that are twice in one object of a JSON document."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Make an object; note keys that are repeated."""
        made = dict(pairs)
        if len(made) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.keys.append(_cut(key))
                seen.add(key)
        return made


def _parse(data: bytes, repeated: _Repeated) -> Any:
    """Parse JSON as RFC 8259 has it. Raises: FormatError."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=repeated.pairs, parse_constant=constant)
    except RecursionError:
        raise FormatError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise FormatError(f"invalid JSON: {_cut(str(error))}") from error


def _first(pairs: Iterator[tuple[Any, Stored]]) -> dict[Any, Stored]:
    found: dict[Any, Stored] = {}
    for key, entry in pairs:
        found.setdefault(key, entry)
    return found


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _shown(value: Any) -> str:
    """Format a value of JSON in a few characters, whatever its size."""
    match value:
        case None:
            return "missing"
        case dict():
            return "an object"
        case list():
            return "a list"
        case int() if not isinstance(value, bool) and abs(value) >= 1 << 128:
            return "a huge number"
        case str():
            return repr(_cut(value))
        case _:
            return repr(value)
