"""Sizes: one grammar and one printer in both languages, and no other printer in the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kho
from kho import errors, fleet, sizes
from kho.cli import output
from kho.doctor import text as doctor_text
from kho.live import size_of as image_size
from kho.sizes import PAGE_SIZES, PAGEBLOCK_ORDERS, SMALL_BITMAP, format_size, parse_size
from kho.sizing.plan import Group, size_of

from command import kho as run

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "rust/kho/src/sizes_cases.txt"
RULES = {
    "syntax": "is not a number with an optional unit K, M, G, T, P or E",
    "sign": "is negative",
    "whole": "is not a whole number of bytes",
    "range": "is not below 2^64",
}
MIB, GIB = 1 << 20, 1 << 30


def cases(kind: str) -> Iterator[tuple[str, str]]:
    """Text and result of each line of the table that begins with `kind`; the Rust tests read it the same way."""
    for line in TABLE.read_text().splitlines():
        if not line.startswith("#"):
            name, text, result = line.split("|")
            if name == kind:
                yield text.replace("\\t", "\t").replace("\\n", "\n"), result


READ, PRINTED = list(cases("read")), list(cases("print"))


@pytest.mark.parametrize(("text", "result"), READ)
def test_the_table_is_read_as_it_says(text: str, result: str) -> None:
    if result in RULES:
        with pytest.raises(errors.ParameterError, match=re.escape(RULES[result])):
            parse_size(text)
    else:
        assert parse_size(text) == int(result)


@pytest.mark.parametrize(("nbytes", "text"), PRINTED)
def test_the_table_is_printed_as_it_says(nbytes: str, text: str) -> None:
    assert format_size(int(nbytes)) == text
    assert format_size(-int(nbytes)) == ("" if nbytes == "0" else "-") + text


def test_the_table_has_every_rule_and_unit() -> None:
    assert {result for _, result in READ} >= set(RULES)
    assert {text.split()[1] for _, text in PRINTED} == set(sizes.UNITS)


def test_an_arena_reads_the_table(tmp_path: Path) -> None:
    """The extension's parser, with the message of a refusal."""
    for text, result in READ:
        if result in RULES:
            with pytest.raises(errors.ParameterError, match=re.escape(RULES[result])):
                kho.Arena(text)
        elif 4096 <= int(result) <= GIB and int(result) % 4096 == 0:
            assert kho.Arena(text).regions == [(0, int(result), 0)]


def test_sources_and_fleets_read_the_table(tmp_path: Path) -> None:
    """`FILE@ADDRESS`, and the address that follows a pattern."""
    ram = tmp_path / "ram.bin"
    ram.write_bytes(bytes(4096))
    for text, result in READ:
        name = f"{ram}@{text}"
        if result in RULES:
            with pytest.raises(errors.SourceError, match="is not an address"):
                kho.Memory.open(name)
        elif int(result) < 1 << 63:
            assert kho.Memory.open(name).ranges == [(int(result), 4096)]
            assert fleet.expand([f"{tmp_path}/*.bin@{text.strip()}"]) == [f"{ram}@{text.strip()}"]
    assert kho.Memory.open(f"{ram}@1.5GiB,offset=0x400,size=1 KiB,hole=1610613248:2G").ranges == [
        (3 * GIB // 2, 512),
        (2 * GIB, 512),
    ]
    assert fleet.expand([f"{tmp_path}/r*@1.5G,offset=0.5K,size=1 KiB,hole=3.5G:4G"]) == [
        f"{ram}@1.5G,offset=0.5K,size=1 KiB,hole=3.5G:4G"
    ]
    with pytest.raises(errors.ParameterError, match="nothing matches"):
        fleet.expand([f"{tmp_path}/*,v=1.elf"])


@pytest.mark.parametrize("text", ["1.5G", "1536M", "1536 MiB", "1.5gib", "0x60000000", "0x6000_0000", "1610612736"])
def test_every_reader_takes_every_spelling(text: str, tmp_path: Path) -> None:
    nbytes = 3 * GIB // 2
    assert parse_size(text) == size_of(text) == image_size(text) == nbytes
    assert kho.plan(text, ["1x2M"]).memory == nbytes
    assert Group.parse(f"3x{text}").size == nbytes
    assert kho.Arena(text).regions == [(0, nbytes, 0)]
    done = run("plan", "--memory", text, "--folios", "1x2 MiB", "--reserved", f"{text},{text}", "--no-calibrate")
    assert (done.code, done.err) == (0, "")
    assert "1.5 GiB of memory" in done.out


def test_options_take_sizes_and_refuse_with_the_rule(tmp_path: Path) -> None:
    core = tmp_path / "core.elf"
    kho.plan("64M")
    done = run("simulate", "--memory", "64M", "--folios", "16x4K", "--no-calibrate", "--keep", core)
    assert done.code == 0
    at = kho.open(core).fdt_phys
    for text in (str(at), hex(at), f"{at / 1024:g}K", f"{at / 1024:g} kib"):
        assert run("inspect", core, "--fdt-phys", text, "--page-size", "4K").code == 0
    for text, rule in (("1.0001K", "whole"), ("lots", "syntax"), ("16E", "range"), ("", "syntax")):
        done = run("inspect", core, "--fdt-phys", text)
        assert done.code == 2
        assert f"{text!r} {RULES[rule]} (write 4096, 0x1000, 64K or 1.5G)" in " ".join(done.err.split())


def test_a_refusal_names_the_place_the_value_the_rule_and_an_example() -> None:
    with pytest.raises(errors.ParameterError) as caught:
        parse_size("1.0001K", "memory")
    assert str(caught.value) == "memory: '1.0001K' is not a whole number of bytes (write 4096, 0x1000, 64K or 1.5G)"
    for number, rule in ((-1, "-0x1 is negative"), (1 << 64, "0x10000000000000000 is not below 2^64")):
        with pytest.raises(errors.ParameterError, match=re.escape(rule)):
            parse_size(number)
    with pytest.raises(TypeError):
        parse_size(1.5)  # type: ignore[arg-type]
    for long in ("9" * 10_000, "\xe0" * 10_000, "-" * 10_000, " " * 10_000):
        with pytest.raises(errors.ParameterError) as caught:
            parse_size(long)
        assert len(str(caught.value)) < 250


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_are_read_back(n: int) -> None:
    for text in (str(n), hex(n), f"0X{n:X}", f" {n} B\n", f"{n:_}", f"{n:#_x}"):
        assert parse_size(text) == n


@given(st.integers(1, 1023), st.integers(0, 6))
def test_exact_sizes_are_read_back_as_printed(n: int, power: int) -> None:
    nbytes = n << 10 * power
    if nbytes < 1 << 64:
        assert parse_size(format_size(nbytes)) == nbytes


@given(st.integers(0, (1 << 64) - 1))
def test_a_printed_size_is_within_half_a_decimal(nbytes: int) -> None:
    number, unit = format_size(nbytes).split()
    scale = 1 << 10 * sizes.UNITS.index(unit)
    assert abs(float(number) * scale - nbytes) <= scale * 0.0501
    assert float(number) < 1024
    assert ("." in number) is (unit != "B")


@given(st.text(max_size=20) | st.from_regex(r"[-0-9a-fxKMGTPEiB._ ]{0,20}", fullmatch=True))
def test_both_languages_agree_on_any_text(text: str) -> None:
    """Whether `Arena` refuses a text by its grammar, or goes on to what an arena can be."""

    def refused(read: Callable[[str], object]) -> str | None:
        try:
            read(text)
        except errors.KhoError as error:
            return next((rule for rule, words in RULES.items() if words in str(error)), None)
        return None

    try:
        nbytes = parse_size(text)
    except errors.ParameterError:
        assert refused(kho.Arena) == refused(parse_size)
    else:
        assert refused(kho.Arena) is None
        if nbytes <= GIB and nbytes and nbytes % 4096 == 0:
            assert kho.Arena(text).regions == [(0, nbytes, 0)]


def test_pages_and_bitmaps_are_those_of_the_extension() -> None:
    for size in range(0, 1 << 18, 512):
        try:
            kho.Tracker(page_size=size)
        except errors.ParameterError:
            assert size not in PAGE_SIZES
        else:
            assert size in PAGE_SIZES
    for page, order in PAGEBLOCK_ORDERS.items():
        spec = kho.parse_kho_scratch("1,1,1").sizes(0, 0, [0], page << order)
        assert spec == [page << order] * 3
        assert kho.Tracker(page_size=page, bitmap_bytes=SMALL_BITMAP).bitmap_bytes == SMALL_BITMAP


NUMBERED = re.compile(r"[0-9.]+ [KMGTPE]iB\b")
ALLOWED = {
    "doctor/messages.py": "what the kernel prints, quoted",
    "doctor/kernellog.py": "regular expressions for what the kernel prints",
    "doctor/rules.py": "'hundreds of GiB', in the explanation of a rule",
}
"""Modules with a unit that does not follow a literal number, and why."""


def printers(source: str) -> list[tuple[int, str]]:
    """Lines with a unit in a string, apart from docstrings and from `4 GiB` written out: a size is formatted there."""
    tree = ast.parse(source)
    documentation = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
        and re.search(r"[KMGTPE]iB\b", NUMBERED.sub("", node.value))
    ]


def test_only_the_printer_of_sizes_writes_units() -> None:
    package = ROOT / "python/kho"
    found = {
        str(path.relative_to(package)): lines
        for path in sorted(package.rglob("*.py"))
        if path != package / "sizes.py" and (lines := printers(path.read_text()))
    }
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}
    assert set(found) == set(ALLOWED), "an exception that is not needed"


@pytest.mark.parametrize(
    "source",
    ['f"{n >> 20} MiB"', '"%d GiB" % n', '"{:.1f} KiB".format(n)', 'UNITS = ("B", "KiB")', 'str(n) + "TiB"'],
)
def test_a_second_printer_would_be_found(source: str) -> None:
    assert printers(f"x = {source}")


def test_a_size_written_out_is_no_printer() -> None:
    assert not printers('def f():\n    """In MiB."""\n    return "areas below 4 GiB"')


def test_every_printer_is_the_same_function() -> None:
    from kho.text import size

    assert size is output.size is doctor_text.size is format_size
