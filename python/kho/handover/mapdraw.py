"""Draws a memory map: a list of boxes and labels, written as SVG, HTML or PNG."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

from ..errors import KhoError, ParameterError, SourceError
from ..text import printable, size
from .memmap import KINDS, Gap, MemoryMap, Row

__all__ = ["COLORS", "COLOURS", "Drawing", "draw", "save", "to_html", "to_png", "to_svg"]

COLORS = {
    "file": "#2f9e57",
    "region": "#d99a00",
    "payload": "#1f9ab0",
    "metadata": "#8e44ad",
    "unclaimed": "#d6336c",
    "scratch": "#9db4d4",
}
"""Kind of memory -> color; the colors differ in lightness too."""
COLOURS = COLORS
"""Earlier name of `COLORS`, kept for importers."""
EMPTY, ABSENT, INK, FAINT = "#e9ecef", "#ffffff", "#212529", "#6c757d"
CELL, HEIGHT, PITCH, LEFT, RIGHT, MARGIN = 10, 14, 18, 150, 330, 16
FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"


@dataclass(frozen=True)
class Box:
    """A filled rectangle, in pixels."""

    x: float
    y: float
    width: float
    height: float
    fill: str
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Label:
    """Text that begins at (with `right`: ends at) a point on its baseline."""

    x: float
    y: float
    text: str
    color: str = INK
    size: int = 11
    bold: bool = False
    right: bool = False


@dataclass
class Drawing:
    """Boxes and labels, with coordinates in pixels."""

    width: int
    height: int = 0
    boxes: list[Box] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)


def draw(found: MemoryMap, title: str) -> Drawing:
    """Lay out the map: a legend, then a line per row, and a line of text per gap between rows."""
    columns = found.row_bytes // found.cell_bytes
    out = Drawing(LEFT + columns * CELL + RIGHT)
    y = MARGIN + 14
    out.labels.append(Label(MARGIN, y, printable(title), size=14, bold=True))
    y += 18
    scale = f"a line is {size(found.row_bytes)}, a cell {size(found.cell_bytes)}; the fuller, the darker"
    out.labels.append(Label(MARGIN, y, scale, FAINT))
    y += 12
    x = MARGIN
    for kind, nbytes in found.totals.items():
        text = f"{KINDS[kind]} {size(nbytes)}"
        if x + 36 + 7 * len(text) > out.width:
            x, y = MARGIN, y + 18
        out.boxes.append(Box(x, y, 12, 12, COLORS[kind]))
        out.labels.append(Label(x + 17, y + 10, text))
        x += 36 + 7 * len(text)
    y += 28
    for line in found.lines:
        if isinstance(line, Row):
            _row(out, line, found.cell_bytes, y)
        else:
            out.labels.append(Label(LEFT, y + 11, words(line), FAINT))
        y += PITCH
    out.height = y + MARGIN
    return out


def words(gap: Gap) -> str:
    """Describe a gap between two rows."""
    if gap.kind is not None:
        return f"\u2026 {size(gap.nbytes)} more of {printable(gap.owner)}"
    if gap.ram is None:
        return f"\u2026 {size(gap.nbytes)}, nothing preserved"
    there = f"{size(gap.ram)} of it in this memory" if gap.ram else "not in this memory"
    return f"\u2026 {size(gap.nbytes)}, nothing preserved, {there}"


def _row(out: Drawing, row: Row, cell_bytes: int, y: int) -> None:
    out.labels.append(Label(LEFT - 10, y + 11, f"{row.phys:#x}", right=True))
    runs: list[tuple[int, int, str, float, str]] = []
    for i, cell in enumerate(row.cells):
        kind = cell.kind
        fill = COLORS[kind] if kind else EMPTY if cell.ram else ABSENT
        opacity = round(0.25 + 0.75 * cell.density(cell_bytes), 2) if kind else 1.0
        what = KINDS[kind] if kind else "nothing preserved" if cell.ram else "not in this memory"
        if runs and runs[-1][2:] == (fill, opacity, what):
            runs[-1] = (runs[-1][0], i + 1, *runs[-1][2:])
        else:
            runs.append((i, i + 1, fill, opacity, what))
    for first, end, fill, opacity, what in runs:
        where = f"{row.phys + first * cell_bytes:#x}-{row.phys + end * cell_bytes:#x}"
        out.boxes.append(Box(LEFT + first * CELL, y, (end - first) * CELL, HEIGHT, fill, opacity, f"{where}: {what}"))
    named = ", ".join(f"{printable(owner)} {size(nbytes)}" for owner, nbytes in row.owners[:3])
    more = f" +{len(row.owners) - 3}" if len(row.owners) > 3 else ""
    room = (RIGHT - 2 * MARGIN) // 6
    text = named + more if len(named + more) <= room else (named + more)[: room - 1] + "\u2026"
    out.labels.append(Label(LEFT + len(row.cells) * CELL + 12, y + 11, text, FAINT, size=10))


def _svg(drawing: Drawing) -> ET.Element:
    w, h = str(drawing.width), str(drawing.height)
    svg = ET.Element("svg", xmlns="http://www.w3.org/2000/svg", width=w, height=h, viewBox=f"0 0 {w} {h}")
    svg.set("font-family", FONT)
    ET.SubElement(svg, "rect", width=w, height=h, fill="#ffffff")
    for box in drawing.boxes:
        rect = ET.SubElement(svg, "rect", x=f"{box.x:g}", y=f"{box.y:g}", fill=box.fill)
        rect.set("width", f"{box.width:g}")
        rect.set("height", f"{box.height:g}")
        if box.opacity != 1:
            rect.set("fill-opacity", f"{box.opacity:g}")
        if box.title:
            ET.SubElement(rect, "title").text = box.title
    for label in drawing.labels:
        text = ET.SubElement(svg, "text", x=f"{label.x:g}", y=f"{label.y:g}", fill=label.color)
        text.set("font-size", str(label.size))
        if label.bold:
            text.set("font-weight", "bold")
        if label.right:
            text.set("text-anchor", "end")
        text.text = label.text
    return svg


def to_svg(found: MemoryMap, title: str = "kho map") -> str:
    """Return the map as an SVG image; the tooltip of each box shows its addresses."""
    return ET.tostring(_svg(draw(found, title)), encoding="unicode", xml_declaration=True) + "\n"


def to_html(found: MemoryMap, title: str = "kho map") -> str:
    """Return the map as a self-contained HTML page: the picture and a table of owners."""
    html = ET.Element("html", lang="en")
    head, body = ET.SubElement(html, "head"), ET.SubElement(html, "body")
    ET.SubElement(head, "meta", charset="utf-8")
    ET.SubElement(head, "title").text = printable(title)
    ET.SubElement(head, "style").text = (
        f"body {{ font: 13px {FONT}; color: {INK}; margin: 1em }} table {{ border-collapse: collapse }}"
        " th, td { padding: .15em 1em .15em 0; text-align: left; vertical-align: top } td.n { text-align: right }"
    )
    body.append(_svg(draw(found, title)))
    table = ET.SubElement(body, "table")
    top = ET.SubElement(table, "tr")
    for heading in ("", "owner", "what", "bytes", "places", "addresses"):
        ET.SubElement(top, "th").text = heading
    for span in found.spans:
        tr = ET.SubElement(table, "tr", title=f"{span.nbytes} bytes")
        ET.SubElement(tr, "td", style=f"color: {COLORS[span.kind]}").text = "\u25a0"
        ET.SubElement(tr, "td").text = printable(span.owner)
        ET.SubElement(tr, "td").text = KINDS[span.kind]
        ET.SubElement(tr, "td", {"class": "n"}).text = size(span.nbytes)
        ET.SubElement(tr, "td", {"class": "n"}).text = str(len(span.intervals))
        shown = ", ".join(f"{start:#x}-{end:#x}" for start, end in span.intervals[:6])
        ET.SubElement(tr, "td").text = shown + (", \u2026" if len(span.intervals) > 6 else "")
    return "<!DOCTYPE html>\n" + ET.tostring(html, encoding="unicode", method="html") + "\n"


def to_png(found: MemoryMap, path: Path, title: str = "kho map") -> None:
    """Write the map as a PNG image. Raises: ParameterError without matplotlib (`pip install kho[plot]`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError as error:
        raise ParameterError(
            f"{path}: PNG needs matplotlib (pip install 'kho[plot]'); .svg and .html do not"
        ) from error
    drawing = draw(found, title)
    figure = Figure(figsize=(drawing.width / 72, drawing.height / 72), dpi=144)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis("off")
    for box in drawing.boxes:
        axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, color=box.fill, alpha=box.opacity, linewidth=0))
    for label in drawing.labels:
        axes.text(
            label.x,
            label.y,
            label.text.replace("$", r"\$"),
            color=label.color,
            fontsize=label.size,
            fontweight="bold" if label.bold else "normal",
            ha="right" if label.right else "left",
            family="monospace",
        )
    FigureCanvasAgg(figure).print_png(str(path))  # type: ignore[no-untyped-call,unused-ignore]


def save(found: MemoryMap, path: Path, title: str = "kho map") -> None:
    """Write the map to a file; its suffix selects the format: .svg, .html or .png.

    Raises: ParameterError for another suffix, or for a PNG without matplotlib; SourceError if it cannot be written.
    """
    kind = path.suffix.lower()
    if kind not in (".svg", ".html", ".png"):
        raise ParameterError(f"{path}: the suffix must be .svg, .html or .png")
    try:
        if kind == ".png":
            to_png(found, path, title)
        else:
            path.write_text(to_svg(found, title) if kind == ".svg" else to_html(found, title), encoding="utf-8")
    except KhoError:
        raise
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error
