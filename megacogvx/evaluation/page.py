"""The parts of a self-contained HTML page: text, tables, pictures and videos inside the file, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #66727f; --line: #e3e7ec; --tint: #f6f8fa; --blue: #2457a6; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
       "Helvetica Neue", sans-serif; }
main { max-width: 1000px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 21px; margin: 52px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 26px 0 6px; }
p { margin: 8px 0 12px; max-width: 76ch; }
.soft, figcaption, small { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px; margin: 24px 0 0; }
.card { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 22px; line-height: 1.25; font-weight: 600; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 14px; }
figure { margin: 14px 0 22px; }
figure svg, figure img { width: 100%; height: auto; display: block; }
figure img.small { image-rendering: auto; border-radius: 6px; }
figcaption { font-size: 14px; margin-top: 6px; max-width: 86ch; }
.video { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 20px; align-items: start;
         margin: 18px 0; }
.video video { width: 100%; max-height: 440px; border-radius: 8px; background: var(--tint); display: block; }
.video p { margin-top: 0; font-size: 18px; }
@media (max-width: 700px) { .video { grid-template-columns: 1fr; } }
table { border-collapse: collapse; width: 100%; margin: 12px 0 20px; font-size: 15px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px; }
th, td { padding: 6px 10px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap;
                       padding-right: 18px; }
.bar { display: inline-block; height: 10px; border-radius: 3px; background: var(--blue); opacity: .75; min-width: 2px; }
.missing { background: #fff8e6; border: 1px solid #f1ddb0; border-radius: 8px; padding: 10px 14px; max-width: none; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--blue); }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
      font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
      overflow-wrap: anywhere; }
li { margin: 5px 0; max-width: 80ch; }
"""


def document(title: str, subtitle: str, body: str) -> str:
    """Return the whole page; `body` is HTML, the others are text. A policy in it forbids anything from outside."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; media-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<h1>{text(title)}</h1>\n<p class="soft">{text(subtitle)}</p>\n{body}\n</main>\n</body>\n</html>\n'
    )


def text(value: object) -> str:
    """Return `value` as text of a page, markup escaped."""
    return html.escape(str(value), quote=True)


def section(title: str, *parts: str) -> str:
    """Return a titled section of parts that are HTML."""
    return f"<section>\n<h2>{text(title)}</h2>\n" + "\n".join(part for part in parts if part) + "\n</section>"


def paragraph(value: str) -> str:
    """Return a paragraph of text."""
    return f"<p>{text(value)}</p>"


def missing(value: str) -> str:
    """Return a box that says what could not be shown."""
    return f'<p class="missing">Missing: {text(value)}</p>'


def cards(items: Iterable[tuple[str, str]]) -> str:
    """Return a row of (number, what it is)."""
    boxes = "".join(f'<div class="card"><b>{text(n)}</b><span>{text(what)}</span></div>' for n, what in items)
    return f'<div class="cards">{boxes}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = (), bar: bool = False) -> str:
    """Return a table.

    Args:
        head: a title per column.
        rows: cells, as text.
        numbers: columns that are set to the right.
        bar: whether each row ends in one more cell, a share of 0 .. 1 that is drawn as a bar.
    """
    kinds = dict.fromkeys(numbers, ' class="number"')
    top = "".join(f"<th{kinds.get(i, '')}>{text(name)}</th>" for i, name in enumerate(head)) + (
        "<th></th>" if bar else ""
    )
    lines = []
    for row in rows:
        cells = "".join(f"<td{kinds.get(i, '')}>{text(cell)}</td>" for i, cell in enumerate(row[: len(head)]))
        if bar:
            cells += (
                f'<td style="width:38%"><span class="bar" style="width:{100 * float(str(row[-1])):.1f}%"></span></td>'
            )
        lines.append(f"<tr>{cells}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def figure(content: str, caption: str) -> str:
    """Return a picture (HTML) with a caption (text)."""
    return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def details(title: str, content: str) -> str:
    """Return text that is shown, as it stands, when its title is opened."""
    return f"<details><summary>{text(title)}</summary><pre>{text(content)}</pre></details>"


def bullets(items: Iterable[str]) -> str:
    """Return a list of texts."""
    return "<ul>" + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>"


def image(path: Path, alt: str) -> str:
    """Return a PNG file as a picture inside the page."""
    return _image(path.read_bytes(), alt)


def pixels(pixels_HWC: torch.Tensor, alt: str) -> str:
    """Return uint8 pixels `[H, W, 3]` as a picture inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC.numpy()).save(buffer, "PNG", optimize=True)
    return _image(buffer.getvalue(), alt)


def video(path: Path) -> str:
    """Return an MP4 file as a video inside the page, which repeats."""
    source = f"data:video/mp4;base64,{_base64(path.read_bytes())}"
    return f'<video controls loop muted autoplay playsinline src="{source}"></video>'


def _image(png: bytes, alt: str) -> str:
    return f'<img class="small" alt="{text(alt)}" src="data:image/png;base64,{_base64(png)}">'


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
