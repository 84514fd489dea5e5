"""Finds kernel messages in a log of any format by their content, whatever prefix a line has.

dmesg and journalctl in each of their output formats, syslog of two RFCs, console captures with and without line
ends, CI runners, container runtimes, netconsole and pstore add different prefixes and suffixes to the same message. A
message is therefore searched for by its first words (`TOKENS`), and extends to the next time stamp, message or line
end. JSON is decoded, terminal escapes are removed. Time and memory are linear in the size of the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

LINE_LIMIT = 4096
"""Characters of a line that are examined before and after a token."""
PER_BOOT = 2000
"""Maximum number of messages of a boot; further messages are skipped up to the next boot."""
BROKEN_JSON = 100
"""Malformed JSON values after which a file is read as text: each of them may cost a scan of the file."""
TOKENS = re.compile(
    r"Linux version \d+\.\d\S{0,80} \(|Kernel command line: |Command line: |KHO: |luo: |LUO: |liveupdate: |"
    r"cma: Reserved |hugetlb_cma: reserve|Memory: \d{1,15}K/\d{1,15}K available|node +\d{1,5}: \[mem 0x|"
    r"Malformed early option '(?:kho|liveupdate)|crashkernel reserved: |cannot allocate crashkernel|"
    r"kexec_file: |kexec_file_load: type:|\.text \.data \.bss are not marked|ioremap on RAM at |"
    r"Passed KHO data, but |KHO reserve-mem '|Revived memory reservation '|memfd_luo: |test_kho: |"
    r"FDT 'memblock' has no child |failed to prepare memblock FDT for KHO|"
    r"Kernel panic - not syncing: The incoming tree |Kdump: loaded |Initmem setup node \d{1,5} as memoryless|"
    r"-- Boot [0-9a-f]{32} --|-- Reboot --"
)
BANNER = re.compile(r"Linux version \d+\.\d\S{0,80} \(|-- Boot [0-9a-f]{32} --|-- Reboot --")
END = re.compile(
    r"[\r\n]|<[0-7]>(?=\S)|(?:<\d{1,3}>)?\[ *\+?\d{1,10}\.\d{6}[\] ]|\[(?: {1,2}OK {1,2}|FAILED|DEPEND|[ *]{6})\] "
)
STAMP = re.compile(r"\[ *(\d{1,10}\.\d{6})(?: <[ +\d.]{1,20}>)?\]|\d{1,3},\d{1,20},(\d{1,15}),[^;\n]{0,200};$")
KMSG = re.compile(r"\d{1,3},\d{1,20},\d{1,15},[^;\n]{0,200};$")
IDENTIFIER = re.compile(
    r"(?:^|\s)([\w./@-]{1,64})\[\d{1,10}\]: |"
    r"(?:\d\d:\d\d:\d\d\S{0,40}(?: [A-Z]{2,5})?|\d{10}\.\d{1,9}|\] ) ?[\w.:-]{1,255} ([\w./@-]{1,64}): "
)
"""The program name in a syslog line: with a process id, or after time and host. Its messages are not the kernel's."""
FIELD = re.compile(r"\s*([A-Z_][A-Z0-9_]{0,63})=")
ENTRY = re.compile(r";b=([0-9a-f]{32})")
"""The boot id in the cursor at the beginning of each entry of `journalctl -o export` and `-o verbose`."""
KEYS = ("message", "msg", "log", "line", "text", "textpayload", "output", "content", "body", "event", "raw", "value")
PAIR = re.compile(rf'"(?:{"|".join(KEYS)})"\s{{0,8}}:\s{{0,8}}"((?:[^"\\]|\\.)*)"', re.IGNORECASE)
ANY_PAIR = re.compile(r'"[^"\\]{1,64}"\s{0,8}:\s{0,8}"((?:[^"\\]|\\.)*)"')
LOGFMT = re.compile(r'\b(?:msg|message|log|line)="((?:[^"\\]|\\.)*)"')
ESCAPE = re.compile(
    rb"\x1b(?:\[[0-?]{0,64}[ -/]{0,8}[@-~]|[_\]PX^][^\x07\x1b\n]{0,4096}(?:\x07|\x1b\\)?|[@-Z\\-_]|[ -/]{1,8}[0-~])"
)
SHOWN_ESCAPE = re.compile(r"(?:#033|\^\[|\\x1b|\\033|\\u001b|\\e|\xe2\x90\x9b|\x1b)\[[0-9;]{0,32}[A-Za-z]")


BASE64 = re.compile(r"(?<![A-Za-z0-9+/\s])[A-Za-z0-9+/\s]{400,}={0,2}")
ESCAPES = 8
"""Minimum number of `\\n` escapes in a log that is one string. A command line with initrd=\\EFI\\nixos has one."""
LITERALS = {"r": "\r", "n": "\n", "t": "\t"}
STARTS = re.compile(
    r"[\s>|]{0,8}(?:\[ *\d|\[\w{3} |<\d|kern  ?:|[A-Z][a-z]{2} [ \d]\d |\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d)"
)
"""The beginning of a line with a time or a log level."""
QUOTE = re.compile(r"([\"'])\s{0,8}(?:<\d{1,3}>)?(?:\[[^\]]{0,64}\]\s{0,8}){0,3}$")
"""A quotation mark before a message; such a message also ends with one."""


class Message(NamedTuple):
    """A kernel message, or a separator between boots (its text is empty)."""

    line: int | None
    """Counted from 1; None if unknown."""
    text: str
    """The message from its token on."""
    stamp: float | None = None
    """Seconds since the kernel started."""
    boot_id: str | None = None
    """Boot id of the journal."""


def messages(data: bytes, numbered: bool = True) -> Iterator[Message]:
    """Yield the messages that begin with a token, in order.

    Args: data: a log in any format. numbered: True if `data` begins at line 1, so that lines can be counted.
    """
    text = decoded(data)
    if TOKENS.search(text) is None and (inner := _of_base64(text)) is not None:
        yield from messages(inner, numbered=False)
        return
    start = text.lstrip("\ufeff \t\r\n")[:1]
    if start and start in '{[\x1e"' and (found := _values(text)) is not None:
        yield from _of_values(found, text, numbered)
        return
    for form in (_of_escapes, _of_columns):
        plain = form(text)
        if plain is not None:
            text, numbered = plain, False
    yield from _of_lines(text, numbered)


def _of_base64(text: str) -> bytes | None:
    """Decode the output of EC2's GetConsoleOutput; None if there is no long piece of base64 that has a log."""
    import base64

    for match in BASE64.finditer(text):
        digits = "".join(match[0].split())
        data = base64.b64decode(digits[: len(digits) // 4 * 4])
        if TOKENS.search(data.decode("latin-1")):
            return data
    return None


def _of_escapes(text: str) -> str | None:
    """Unescape a log that is one string, where most line ends are escapes; None for any other log."""
    escaped = text.count("\\n")
    if escaped < ESCAPES or escaped < 2 * text.count("\n"):
        return None
    text = re.sub(r"\\(r|n|t|[\"'/\\])", lambda code: LITERALS.get(code[1], code[1]), text)
    return SHOWN_ESCAPE.sub("", text)


def _of_columns(text: str) -> str | None:
    """Join lines that a terminal wrapped at its width; None for a log whose lines are complete."""
    lines = text.split("\n")
    width = max(map(len, lines))
    if not 40 <= width <= 400:
        return None
    full = [n for n, line in enumerate(lines[:-1]) if len(line) == width]
    cut = [n for n in full if not STARTS.match(lines[n + 1])]
    if len(cut) < 3 or len(cut) < 0.8 * len(full) or not all(STARTS.match(lines[n]) for n in cut[:1]):
        return None
    ends = set(cut)
    return "".join(line if n in ends else f"{line}\n" for n, line in enumerate(lines))


def decoded(data: bytes) -> str:
    """Return a log without terminal escapes, as text with one character for each byte of its UTF-8."""
    sample = data[:4096]
    encoding = None
    if sample.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        encoding = "utf-32"
    elif sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif len(sample) >= 4:
        even, odd = sample[::2].count(0) * 2 / len(sample), sample[1::2].count(0) * 2 / len(sample)
        encoding = "utf-16-le" if odd > 0.6 and even < 0.1 else "utf-16-be" if even > 0.6 and odd < 0.1 else None
    if encoding is not None:
        data = data.decode(encoding, "replace").encode("utf-8", "replace")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in data:
        data = data.replace(b"\0", b" ")
    if b"\x1b" in data:
        data = ESCAPE.sub(b"", data)
    text = data.decode("latin-1")
    if ",ncfrag=" in text:  # netconsole splits a long message into fragments, one a line
        text = re.sub(r"\n[^\n;]{0,200},ncfrag=[1-9]\d{0,6}/\d{1,7};", "", text)
    return text


def utf8(text: str) -> str:
    """Return the Unicode of text that has one character for each byte."""
    return text.encode("latin-1", "replace").decode("utf-8", "replace")


def _of_lines(text: str, numbered: bool) -> Iterator[Message]:
    """Yield messages found in lines, or in text without line ends."""
    kernels = " kernel: " in text
    exported = re.search(r"^[ \t]{0,16}MESSAGE=", text, re.MULTILINE) is not None
    chosen = "_TRANSPORT=kernel" in text
    borders = _borders(text)
    border = next(borders, None)
    at, line, counted, taken = 0, 1, 0, 0
    while True:
        match = (TOKENS if taken < PER_BOOT else BANNER).search(text, at)
        if match is None:
            return
        while border is not None and border[0] <= match.start():
            yield Message(None, "", boot_id=border[1])
            border, taken = next(borders, None), 0
        start = max(text.rfind("\n", max(match.start() - LINE_LIMIT, 0), match.start()) + 1, at)
        start = max(start, match.start() - LINE_LIMIT)
        end = text.find("\n", match.end(), match.end() + LINE_LIMIT)
        if end < 0:  # a longer line, or no line end: cut where another message begins, if possible
            end = min(match.end() + LINE_LIMIT, len(text))
            if end < len(text):
                cuts = [cut.start() for cut in END.finditer(text, match.end(), end)]
                end = cuts[-1] if cuts else end
        line += text.count("\n", counted, match.start())
        counted, at = match.start(), end
        shown = text[start:end]
        field = FIELD.match(shown) if exported else None
        if field is not None and field[1] != "MESSAGE":
            continue
        if chosen and not _of_kernel(text, match.start()):
            continue
        for part in unwrap(shown):
            for message in messages_in(part, line if numbered else None, kernels):
                taken = 0 if BANNER.match(message.text) else taken + 1
                yield message


def _of_kernel(text: str, at: int) -> bool:
    """Return whether an entry of an exported journal comes from the kernel, not from a program that quotes it."""
    start = text.rfind("\n\n", max(at - LINE_LIMIT, 0), at)
    end = text.find("\n\n", at, at + LINE_LIMIT)
    entry = text[max(start, at - LINE_LIMIT, 0) : end if end >= 0 else at + LINE_LIMIT]
    transport = re.search(r"_TRANSPORT=(\w{1,16})", entry)
    return transport is None or transport[1] == "kernel"


def _borders(text: str) -> Iterator[tuple[int, str]]:
    """Yield (offset, boot id) where the entries of another boot begin in a journal."""
    last = None
    for match in ENTRY.finditer(text) if ";b=" in text else ():
        if match[1] != last:
            yield match.start(), match[1]
            last = match[1]


def unwrap(line: str, depth: int = 0) -> list[str]:
    """Extract messages from the JSON or key="value" pairs of a line; any other line is returned unchanged."""
    if '"' not in line or depth > 3:
        return [line]
    for pattern, needs in ((PAIR, '":'), (PAIR, '" :'), (ANY_PAIR, '":'), (LOGFMT, '="')):
        if needs not in line:
            continue
        found = [text for match in pattern.finditer(line) if TOKENS.search(text := _unescaped(match[1]))]
        if found:
            return [inner for text in found for inner in unwrap(text, depth + 1)]
    return [line]


def _unescaped(body: str) -> str:
    """Decode the body of a JSON string; a malformed one is returned unchanged."""
    import json

    try:
        value = str(json.loads(f'"{body}"', strict=False))
    except ValueError:
        return body
    return SHOWN_ESCAPE.sub("", value.encode("utf-8", "replace").decode("latin-1"))


def messages_in(text: str, line: int | None, kernels: bool = False) -> Iterator[Message]:
    """Yield messages found in a piece of text.

    Args: kernels: True if the log has `kernel:` before kernel messages; messages of other programs are then skipped.
    """
    if "[" in text:
        text = SHOWN_ESCAPE.sub("", text)
    at, match = 0, TOKENS.search(text)
    while match is not None:
        start, word, after = match.start(), match[0], match.end()
        # Find the next token first: the end of this message is searched for only up to it, so that time stays linear.
        match = TOKENS.search(text, after)
        prefixed = word[0] in "KlLn" and not word.startswith(("Linux", "Kernel"))
        if prefixed and re.search(r"[A-Za-z0-9_]$", text[max(start - 1, 0) : start]):
            continue  # "test_kho: " and similar prefixes belong to other modules
        begin = max(text.rfind("\n", at, start) + 1, text.rfind("\r", at, start) + 1, at)
        before = text[begin:start]
        who = IDENTIFIER.search(before[-400:]) if kernels else None
        if who is not None and (who[1] or who[2]) != "kernel":
            at = after
            continue
        last = match.start() if match is not None else len(text)
        stop = END.search(text, after, last + 1)  # including the character that must follow an end
        at = end = min(stop.start(), last) if stop is not None else last
        message = text[start:end].rstrip()
        if (quote := QUOTE.search(before[-200:])) is not None:
            message = re.sub(rf"{quote[1]}[\s,;}})\]]{{0,8}}$", "", message)
        if KMSG.search(before):
            message = re.sub(r"\\x([0-9a-f]{2})", lambda code: chr(int(code[1], 16)), message)
        stamps = STAMP.findall(before)
        seconds = (float(stamps[-1][0]) if stamps[-1][0] else int(stamps[-1][1]) / 1e6) if stamps else None
        yield Message(line, utf8(message), seconds)


def _values(text: str) -> list[tuple[int, Any]] | None:
    """Parse consecutive JSON values; return (offset, value) of each, or None if the text is not JSON."""
    import json

    decoder = json.JSONDecoder(strict=False)
    found: list[tuple[int, Any]] = []
    broken = at = 0
    skip = re.compile(r"[\s\x1e,\]\[]*(?:data: ?)?")
    while True:
        match = skip.match(text, at)
        at = match.end() if match is not None else at
        if at >= len(text):
            return found
        try:
            if text[at] != "{":
                raise ValueError(text[at])
            line_end = text.find("\n", at)
            value, end = decoder.raw_decode(text, at) if broken < BROKEN_JSON else (None, line_end)
            found.append((at, value))
            at = end
        except (ValueError, RecursionError):
            broken += 1
            if broken >= BROKEN_JSON or not found:
                return None
            end = text.find("\n", at)
            if end < 0:
                return found
            found.append((at, text[at:end]))
            at = end


def _of_values(values: list[tuple[int, Any]], text: str, numbered: bool) -> Iterator[Message]:
    """Yield messages found in JSON values: journalctl, dmesg --json, docker, consoles of cloud providers."""
    chosen = re.search(r'"_TRANSPORT"\s{0,8}:\s{0,8}"kernel"', text) is not None
    line, counted, last = 1, 0, None
    for at, value in values:
        line += text.count("\n", counted, at)
        counted = at
        for part, record in _texts(value, 0):
            boot_id = record.get("_BOOT_ID")
            if isinstance(boot_id, str) and boot_id != last:
                last = boot_id
                yield Message(None, "", boot_id=boot_id)
            if chosen and record.get("_TRANSPORT", "kernel") != "kernel":
                continue
            when = record.get("time")
            plain = part.encode("utf-8", "replace").decode("latin-1")
            for inner in unwrap(plain) if plain.lstrip().startswith("{") else [plain]:
                for message in messages_in(inner, line if numbered else None):
                    stamp = float(when) if message.stamp is None and isinstance(when, int | float) else message.stamp
                    yield message._replace(stamp=stamp)


def _texts(value: Any, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (text, object that contains it) for the texts of a JSON value."""
    if isinstance(value, str):
        if value:
            yield value, {}
    elif isinstance(value, list) and depth < 8:
        for item in value:
            yield from _texts(item, depth + 1)
    elif isinstance(value, dict) and depth < 8:
        known = [item for key, item in value.items() if key.lower() in KEYS]
        if "MESSAGE" not in value and not any(isinstance(item, str) and TOKENS.search(item) for item in known):
            known = list(value.values())
        for item in known:
            if isinstance(item, list) and item and all(isinstance(code, int) and 0 <= code < 256 for code in item):
                yield ESCAPE.sub(b"", bytes(item)).decode("utf-8", "replace"), value
            elif isinstance(item, str):
                yield item, value
            else:
                yield from _texts(item, depth + 1)
