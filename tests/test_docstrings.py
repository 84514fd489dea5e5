"""Every public name of kho says at run time what it is, in one text that the stub repeats."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import inspect
import pydoc
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kho
import kho.live.transports.holder
from kho import _kho, _types, errors

ROOT = Path(__file__).parent.parent
LONGEST = 100
"""Characters of a docstring's first line."""
CODE = (
    types.BuiltinFunctionType,
    types.FunctionType,
    types.GetSetDescriptorType,
    types.MethodDescriptorType,
    classmethod,
    functools.cached_property,
    property,
    staticmethod,
)
"""What can have a docstring in a class. Fields and constants cannot."""


def members(name: str, owner: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines."""
    fields = {field.name for field in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else set()
    for attribute, value in vars(owner).items():
        if not attribute.startswith("_") and attribute not in fields and isinstance(value, CODE):
            yield f"{name}.{attribute}", getattr(owner, attribute)


def public(module: types.ModuleType, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a module exports: itself, functions, classes with what they define, and modules of kho."""
    yield name, module
    exported = getattr(module, "__all__", [key for key in vars(module) if not key.startswith("_")])
    for key in sorted(exported):
        value = getattr(module, key)
        own = getattr(value, "__module__", "").partition(".")[0] == "kho"
        if inspect.ismodule(value) and value.__name__.startswith("kho."):
            yield from public(value, f"{name}.{key}")
        elif isinstance(value, type) and own:
            yield f"{name}.{key}", value
            yield from members(f"{name}.{key}", value)
        elif inspect.isroutine(value) and own:
            yield f"{name}.{key}", value


PUBLIC = {**dict(public(_kho, "kho._kho")), **dict(public(kho, "kho"))}
DOCS = {name: inspect.getdoc(value) or "" for name, value in PUBLIC.items()}
COMPILED = {name for name in PUBLIC if name.startswith("kho._kho")}


def test_the_names_that_are_looked_at_are_those_of_the_package() -> None:
    for name in (
        "Arena.alloc",
        "Tracker.nbytes",
        "Memory.open",
        "open",
        "errors" if "errors" in kho.__all__ else "plan",
    ):
        assert f"kho.{name}" in PUBLIC
    for name in ("fdt.Node.u32", "doctor.Report.share", "live.Handle.commit", "luo.Session.preserve_fd", "Image.save"):
        assert f"kho.{name}" in PUBLIC
    assert {f"kho.{name}" for name in kho.__all__ if callable(getattr(kho, name))} <= set(PUBLIC)


def test_every_public_name_has_a_docstring() -> None:
    own = {name: value.__doc__ for name, value in PUBLIC.items()}
    assert [name for name, doc in own.items() if not (doc or "").strip()] == []


def test_the_first_line_of_a_docstring_is_a_short_sentence() -> None:
    firsts = {name: doc.partition("\n")[0] for name, doc in DOCS.items()}
    wrong = {name: first for name, first in firsts.items() if len(first) > LONGEST or not first.endswith((".", ":"))}
    assert wrong == {}


def test_errors_that_docstrings_name_exist() -> None:
    known = {*errors.__all__, *(name for name in vars(builtins) if name.endswith("Error"))}
    named = {(name, error) for name, doc in DOCS.items() for error in re.findall(r"\b[A-Z]\w*Error\b", doc)}
    assert len(named) > 100
    assert {(name, error) for name, error in named if error not in known} == set()


def test_sections_of_abi_md_that_docstrings_name_exist() -> None:
    sections = set(re.findall(r"^## (\d+)\. ", (ROOT / "docs/abi.md").read_text(), re.MULTILINE))
    named = {(name, n) for name, doc in DOCS.items() for n in re.findall(r"abi\.md section (\d+)", doc)}
    assert {(name, n) for name, n in named if n not in sections} == set()
    assert {name for name, doc in DOCS.items() if re.search(r"\bABI section", doc)} == set()


def test_arguments_that_docstrings_of_compiled_code_describe_are_those_of_the_call() -> None:
    wrong = {}
    for name in COMPILED:
        section = re.search(r"^Args:\n((?: +.*\n?)+)", DOCS[name], re.MULTILINE)
        if section is None:
            continue
        listed = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE)
        described = [argument for item in listed for argument in item.split(", ")]
        taken = [parameter for parameter in inspect.signature(PUBLIC[name]).parameters if parameter != "self"]
        if described != taken:
            wrong[name] = (described, taken)
    assert wrong == {}


def test_the_docstring_of_a_record_describes_each_field() -> None:
    records = [value for value in vars(_types).values() if isinstance(value, type) and value.__module__ == "kho._types"]
    assert {record.__name__ for record in records} > {"FolioInfo", "MemfdFolio", "PageInfo"}
    for record in records:
        section = (record.__doc__ or "").partition("Fields:\n")[2]
        assert re.findall(r"^        (\w+): ", section, re.MULTILINE) == list(inspect.signature(record).parameters)


def test_help_shows_the_call_and_the_docstring() -> None:
    shown = pydoc.plain(pydoc.render_doc(kho.Arena.alloc))
    assert "alloc(self, /, order=0, *, node=None, gigantic=False)" in shown
    assert "Raises: OutOfMemoryError; OrderError above `max_page_order`" in shown
    shown = pydoc.plain(pydoc.render_doc(kho.Arena))
    assert "class Arena(builtins.object)" in shown
    assert "Arena(regions, *, page_size=4096, max_page_order=None, backing=None, scratch=None, reserved=0)" in shown


def test_the_stub_has_the_docstrings_of_the_compiled_module() -> None:
    command = [sys.executable, str(ROOT / "scripts/stubs.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
