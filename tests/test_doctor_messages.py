"""Every message of the kernel that concerns KHO has its meaning, with the releases that print it: against the sources.

tests/data/messages.txt was written from the sources: the releases that were read, and the format of each message.
"""

from __future__ import annotations

import re

import pytest

from kho.doctor.messages import MESSAGES, meaning_of

from doctor_hosts import HOSTS

LIST = HOSTS.parent / "messages.txt"
READ = ((6, 17), (6, 18), (6, 19), (7, 1), (7, 2), (7, 3))
"""The series whose sources the list has. 6.16 and 7.0 are claimed from other evidence (abi.md)."""
FORMAT = re.compile(r"%(?:\.\*)?#?0?(?:l{0,2}[duxX]|z[du]|l{0,2}x|p[ae]|s|c)")
VALUES = {
    "luo: Unable to get FLB node [%s]": ("luo-flb",),
    "luo: FLB node is incompatible with '%s' [%d]": ("luo-flb-v1", "-4"),
    "luo: FDT '%s' is incompatible with '%s' [%d]": ("LUO", "luo-v1", "-4"),
    "luo: failed to retrieve FDT '%s' from KHO: %pe": ("LUO", "-EINVAL"),
    "luo: LUO state is incompatible with '%s'": ("luo-v5",),
    "luo: kho_finalize failed %d": ("-12",),
    "memfd_luo: shmem: failed to charge folio index %ld: %d": ("6423", "-12"),
    "FDT '%s' has no child '%s': %d": ("memblock", "keepme", "-1"),
}
"""What stands for a name in a message, where its meaning depends on it."""


def messages() -> list[tuple[str, set[tuple[int, int]]]]:
    """Format and series of each message."""
    found = []
    for line in LIST.read_text().splitlines():
        if not line.startswith("#"):
            releases, _, text = line.partition("|")
            series = {(int(each.split(".")[0]), int(each.split(".")[1])) for each in releases.split(",")}
            found.append((text, series))
    return found


def said(text: str) -> str:
    """A message as the log has it, with values."""
    values = iter(VALUES.get(text, ()))
    return FORMAT.sub(lambda _: next(values, "7"), text.replace("%%", "\0")).replace("\0", "%")


def series_of(releases: str) -> set[tuple[int, int]]:
    """The series among `READ` that a text names: "6.16 to 7.0", "7.1 and later", "6.16, 6.17"."""
    numbers = [(int(a), int(b)) for a, b in re.findall(r"(\d)\.(\d+)", releases)]
    if releases.endswith("and later"):
        return {each for each in READ if each >= numbers[0]}
    if " to " in releases:
        return {each for each in READ if numbers[0] <= each <= numbers[1]}
    return {each for each in READ if each in numbers}


def test_the_list_has_the_messages_of_six_releases() -> None:
    found = messages()
    assert len(found) > 90
    assert {each for _, series in found for each in series} == set(READ)


@pytest.mark.parametrize("text", [text for text, _ in messages()])
def test_a_message_of_the_sources_has_a_meaning_of_its_own(text: str) -> None:
    meaning = meaning_of(said(text))
    assert meaning is not None, said(text)
    assert meaning.wording != "memfd_luo: %", "a meaning, not the one for messages that are not known"
    assert len(re.sub(r"%", "", meaning.wording)) > len(re.sub(FORMAT, "", text)) // 2


def test_a_meaning_names_the_releases_whose_sources_have_the_message() -> None:
    printed: dict[str, set[tuple[int, int]]] = {}
    for text, series in messages():
        meaning = meaning_of(said(text))
        if meaning is not None:
            printed[meaning.wording] = printed.get(meaning.wording, set()) | series
    for meaning in MESSAGES:
        if meaning.wording != "memfd_luo: %":
            assert series_of(meaning.releases) == printed.get(meaning.wording), (meaning.wording, meaning.releases)
