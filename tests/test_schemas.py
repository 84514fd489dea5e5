"""The JSON schemas of the commands: valid, complete, and strict in both directions."""

from __future__ import annotations

import json
import re
from typing import Any

import click
import pytest

from kho.cli import cli, schemas

from captures import NAMES, elf
from command import Done, check, kho

jsonschema = pytest.importorskip("jsonschema")
WITH_JSON = sorted(
    name
    for name, command in cli.commands.items()
    if any("--json" in param.opts for param in command.params if isinstance(param, click.Option))
)


def test_every_command_with_json_has_a_schema_and_no_other_has() -> None:
    assert sorted(schemas.COMMANDS) == WITH_JSON
    listed = kho("schema", "--list").out
    assert re.findall(r"^kho (\S+) +(\S+) *$", listed, re.MULTILINE) == [(name, f"kho-{name}-1") for name in WITH_JSON]


@pytest.mark.parametrize("name", WITH_JSON)
def test_a_schema_is_one_of_2020_12_and_names_itself(name: str) -> None:
    done = kho("schema", name)
    found = done.json
    jsonschema.Draft202012Validator.check_schema(found)
    assert found == schemas.schema(name) == schemas.schema(name)
    assert found["$id"] == f"urn:kho:schema:kho-{name}-1"
    for variant in found.get("oneOf", [found]):
        assert variant["properties"]["schema"] == {"const": f"kho-{name}-1"}
        assert "schema" in variant["required"]


def test_an_unknown_command_has_none() -> None:
    for args in (["schema"], ["schema", "hold"], ["schema", "x\x1b[0m"]):
        done = kho(*args)
        assert (done.code, done.out) == (2, "")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", ["inspect", "owners", "verify", "map", "fdt"])
def test_the_first_member_names_the_schema(name: str, command: str) -> None:
    found = kho(command, "--json", elf(name)).json
    assert next(iter(found)) == "schema"
    assert found["schema"] == f"kho-{command}-1"


def objects(it: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all objects in a document."""
    found = [path] if isinstance(it, dict) else []
    for key, value in it.items() if isinstance(it, dict) else enumerate(it) if isinstance(it, list) else ():
        found += objects(value, (*path, key))
    return found


OPEN = {
    "$",
    "subtrees",
    "folios_by_order",
    "malformed_subtrees",
    "totals",
    "files",
    "kexec_metadata",
    "sub_fdts",
    "trees",
}
"""Members whose own members have names that are not kho's."""


@pytest.mark.parametrize("command", ["inspect", "owners", "verify", "map"])
def test_a_member_that_no_schema_has_is_refused(command: str) -> None:
    text = kho(command, "--json", "--", elf("linux-7.3.4-x86_64")).out
    refused = 0
    for path in objects(json.loads(text)):
        names = [key for key in path if isinstance(key, str)]
        if names and names[-1] in OPEN and not (names == ["files"] and isinstance(path[-1], int)):
            continue
        document = json.loads(text)
        place = document
        for key in path:
            place = place[key]
        place["unheard_of"] = 1
        with pytest.raises(pytest.fail.Exception, match="not as its schema says"):
            check((command, "--json"), json.dumps(document))
        refused += 1
        if refused > 40:
            break
    assert refused


def test_a_member_that_is_missing_or_of_another_type_is_refused() -> None:
    text = kho("verify", "--json", elf("linux-7.3.4-x86_64")).out
    for change in ({"counts": None}, {"sources": "x"}, {"schema": "kho-verify-2"}, {"findings": [{"id": "KHO001"}]}):
        with pytest.raises(pytest.fail.Exception, match="not as its schema says"):
            check(("verify", "--json"), json.dumps(json.loads(text) | change))
    whole = json.loads(text)
    for name in list(whole):
        with pytest.raises(pytest.fail.Exception):
            check(("verify", "--json"), json.dumps({key: value for key, value in whole.items() if key != name}))


def test_integers_that_a_double_cannot_hold_have_strings_next_to_them() -> None:
    limit = 1 << 53

    def large(it: Any, shown: bool = False) -> list[Any]:
        if isinstance(it, dict):
            return [x for key, value in it.items() for x in large(value, f"{key}_hex" in it)]
        if isinstance(it, list):
            return [x for value in it for x in large(value, shown)]
        return [it] if isinstance(it, int) and abs(it) > limit and not shown else []

    done: Done = kho("inspect", "--json", elf("linux-7.3.4-x86_64"))
    assert large(done.json) == []
    assert large({"a": 1 << 60}) == [1 << 60]
