"""A report's blocks as Markdown, HTML and LaTeX, and metrics as CSV. Knows blocks and cells, not what they mean."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nashswarm import paper


@dataclass(frozen=True, slots=True)
class Heading:
    """A section's (2) or a subsection's (3) title."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are ready to be read; the first `left` columns are words."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    prose: bool = False  # whether cells hold sentences, to be wrapped


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG."""

    name: str
    caption: str
    png: bytes


Block = Heading | Text | Items | Table | Picture


def aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
    """Rows of words for a terminal, a rule below the first. Arguments: `sides`, < or > for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(r, sides, widths, strict=True)).rstrip() for r in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(first: str, blocks: Sequence[Block]) -> str:
    """The document as GitHub's Markdown."""
    return "\n\n".join([f"# {_md(first)}", *map(_markdown_block, blocks)]) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_md(text)}"
        case Text(text):
            return _md(text)
        case Items(items):
            return "\n".join(f"- {_md(item)}" for item in items)
        case Picture(name, caption, _):
            return f"![{_md(caption)}]({name})\n\n*{_md(caption)}*"
        case Table(caption, columns, rows, left, _):
            sides = [":--" if i < left else "--:" for i in range(len(columns))]
            lines = [
                f"| {' | '.join(cells)} |" for cells in (list(map(_md, columns)), sides, *(map(_md, r) for r in rows))
            ]
            return "\n".join([f"**{_md(caption)}**", "", *lines])


def _md(text: str) -> str:
    """Literal text; underscores within words stand for themselves in GitHub's Markdown."""
    return re.sub(r"([\\`*|<>])", r"\\\1", text)


# --- HTML ----------------------------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light;--ink:#1d2329;--soft:#5b6570;--line:#d9dde2;--tint:#f5f7f8;--mark:#0b6e63}
*{box-sizing:border-box}
body{margin:0;color:var(--ink);background:#fff;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header>div{max-width:1248px;margin:0 auto;padding:0 16px}
header{background:var(--tint);border-bottom:1px solid var(--line);padding:28px 0 20px}
header p{max-width:52em;margin:0}
.name{color:var(--mark);font-weight:600;letter-spacing:.02em;margin-bottom:6px}
h1{font-size:clamp(1.35rem,3.4vw,2.1rem);line-height:1.25;margin:0 0 14px;max-width:32em;text-wrap:balance}
.n{white-space:nowrap}
h2{font-size:1.4rem;margin:44px 0 10px;padding-top:10px;border-top:2px solid var(--line)}
h3{font-size:1.1rem;margin:28px 0 8px}
main>p,main>ul{max-width:52em}
li{margin:6px 0}
p,li,figcaption{overflow-wrap:anywhere}
nav{margin-top:14px;display:flex;flex-wrap:wrap;gap:6px 18px;font-size:.93rem}
a{color:var(--mark)}
.wide{overflow-x:auto;margin:6px 0 26px;border:1px solid var(--line);border-radius:6px}
.title{font-weight:600;margin:22px 0 6px}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:.84rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{background:var(--tint);vertical-align:bottom;white-space:normal;min-width:4.4em;line-height:1.3}
tbody tr:last-child td{border-bottom:0}
.w{text-align:left}
td:first-child,th:first-child{position:sticky;left:0;background:#fff}
th:first-child{background:var(--tint)}
td:first-child{font-weight:500}
.prose td{white-space:normal;min-width:7em}
.prose td:first-child,.prose td:last-child{min-width:17em;font-weight:400}
.prose td:nth-child(3){min-width:9.5em}
.v{display:inline-block;padding:1px 9px;border-radius:10px;font-weight:600;font-size:.95em}
.yes{background:#d5efe6;color:#0a5047}.no{background:#f8ddd5;color:#8a2c14}.open{background:#e9ecef;color:#444d56}
.pictures{display:flex;flex-wrap:wrap;gap:24px}
figure{margin:0;flex:1 1 min(100%,480px);max-width:612px}
img{width:100%;height:auto;display:block}
figcaption{font-size:.85rem;color:var(--soft);margin-top:6px}
@media (max-width:600px){
 body{font-size:15px}
 .prose thead{display:none}
 .prose table,.prose tbody,.prose tr,.prose td{display:block;width:100%}
 .prose tr{padding:10px 0;border-bottom:1px solid var(--line)}
 .prose tbody tr:last-child{border-bottom:0}
 .prose td{border:0;padding:2px 12px}
 .prose td:first-child{font-weight:600;position:static}
}
@media print{
 @page{size:A4 landscape;margin:12mm}
 body{font-size:10pt}
 header{background:none;padding-top:0}
 nav{display:none}
 main,header>div{max-width:none;padding:0}
 .wide{overflow:visible;border:0}
 table{font-size:7pt}
 th,td{padding:2px 4px}
 th{min-width:0}
 tr,figure{break-inside:avoid}
 h2,h3,.title,h2+p{break-after:avoid}
 p,li{break-inside:avoid}
 td:first-child,th:first-child{position:static}
 .wide:not(.prose){break-inside:avoid}
 .pictures{display:block}
 figure{display:inline-block;width:48%;margin:0 1% 6mm 0;vertical-align:top}
 img{width:auto;max-width:100%;max-height:122mm}
 img.tall{max-height:148mm}
 .v,th{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""
# The browser itself refuses to fetch anything: the page is whole, or it shows that it is not.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MARKS = {paper.HOLDS: "yes", paper.FAILS: "no", paper.OPEN: "open"}


def web_page(first: str, blocks: Sequence[Block]) -> str:
    """The document as one HTML file that loads nothing: style inline, figures as data."""
    sections = [b.text for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{_anchor(s)}">{html.escape(s)}</a>' for s in sections)
    opening = blocks[0].text if blocks and isinstance(blocks[0], Text) else ""
    body = "\n".join(map(_html_block, blocks[1:] if opening else blocks))
    body = re.sub(r"(?:<figure>.*?</figure>\n?)+", lambda m: f'<div class="pictures">\n{m[0].strip()}\n</div>\n', body)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<link rel="icon" href="data:,">\n'
        f"<title>nash-swarm: {html.escape(first)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><div>\n<p class="name">nash-swarm report</p>\n<h1>{_unbroken(first)}</h1>\n'
        f"<p>{html.escape(opening)}</p>\n<nav>{links}</nav>\n</div></header>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _unbroken(text: str) -> str:
    """Numbers stay with their units and brackets whole."""
    return re.sub(r"\d[\d.]* %(?: \[[^\]]*\])?", lambda m: f'<span class="n">{m[0]}</span>', html.escape(text))


def _html_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            mark = f' id="{_anchor(text)}"' if level == 2 else ""
            return f"<h{level}{mark}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Items(items):
            return f"<ul>{''.join(f'<li>{html.escape(i)}</li>' for i in items)}</ul>"
        case Picture(_, caption, png):
            data, words = base64.b64encode(png).decode(), html.escape(caption)
            width, height = struct.unpack(">II", png[16:24])  # of the header, IHDR
            kind = ' class="tall"' if height > width else ""
            image = f'<img{kind} width="{width}" height="{height}" alt="{words}" src="data:image/png;base64,{data}">'
            return f"<figure>{image}<figcaption>{words}</figcaption></figure>"
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    sides = [' class="w"' if i < table.left else "" for i in range(len(table.columns))]
    head = "".join(f'<th scope="col"{s}>{html.escape(c)}</th>' for s, c in zip(sides, table.columns, strict=True))
    rows = ("".join(f"<td{s}>{_html_cell(c)}</td>" for s, c in zip(sides, r, strict=True)) for r in table.rows)
    body = "\n".join(f"<tr>{r}</tr>" for r in rows)
    kind, name = "wide prose" if table.prose else "wide", html.escape(table.caption)
    return (
        f'<p class="title">{name}</p>\n<div class="{kind}" role="region" aria-label="{name}" tabindex="0"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _html_cell(cell: str) -> str:
    mark = MARKS.get(cell)
    return f'<span class="v {mark}">{html.escape(cell)}</span>' if mark else html.escape(cell)


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


# --- LaTeX ---------------------------------------------------------------------------------------------------------

PREAMBLE = r"""% Run LaTeX three times: longtable learns its widths from the run before.
\documentclass[a4paper,landscape]{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage[margin=12mm]{geometry}
\usepackage{array}
\usepackage{booktabs}
\usepackage{longtable}
\setlength{\tabcolsep}{4pt}
\setlength{\parindent}{0pt}
\begin{document}
\footnotesize
"""
TEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "–": "--",
    "≤": r"$\leq$",
}


def latex(first: str, blocks: Sequence[Block]) -> str:
    """The tables as a LaTeX document of their own; each can be lifted out with booktabs, array and longtable."""
    tables = [_latex_table(b) for b in blocks if isinstance(b, Table)]
    return "\n".join([PREAMBLE, rf"\section*{{{_tex(first)}}}", *tables, r"\end{document}"]) + "\n"


def _latex_table(table: Table) -> str:
    """A longtable: it breaks over pages and needs no float."""
    if table.prose:
        form = (
            r"*{2}{>{\raggedright\arraybackslash}p{62mm}}"
            if len(table.columns) == 2
            else (
                r">{\raggedright\arraybackslash}p{82mm}"
                r">{\raggedright\arraybackslash}p{36mm}>{\raggedright\arraybackslash}p{30mm}"
                r">{\raggedright\arraybackslash}p{108mm}"
            )
        )
    else:
        form = "l" * table.left + "r" * (len(table.columns) - table.left)
    heads = [
        _tex(c) if table.prose else rf"\shortstack[r]{{{_tex(c).replace(', ', ',' + chr(92) * 2)}}}"
        for c in table.columns
    ]
    end = r" \\\addlinespace" if table.prose else r" \\"
    rows = [" & ".join(map(_tex, row)) + end for row in table.rows]
    return "\n".join(
        [
            rf"\begin{{longtable}}{{{form}}}",
            rf"\caption{{{_tex(table.caption)}}}\\",
            r"\toprule",
            " & ".join(heads) + r" \\",
            r"\midrule",
            r"\endhead",
            *rows,
            r"\bottomrule",
            r"\end{longtable}",
        ]
    )


def _tex(text: str) -> str:
    """Escaped; a minus before a number is a minus. A row must not begin with a bracket, so those are grouped."""
    escaped = "".join(TEX.get(c, c) for c in text)
    escaped = re.sub(r"(^|[\s\[])-(?=\d)", r"\1$-$", escaped)
    return f"{{{escaped}}}" if escaped.startswith("[") else escaped


# --- CSV -----------------------------------------------------------------------------------------------------------


SERIES = ("allocation.tensors", "peer.notes")


def flat_table(documents: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """All figures as CSV, for other people's plots: one line per (model, method), columns named as in the metrics.

    Series of matrices and windows are left to the metrics.
    """
    import pandas as pd

    frame = pd.json_normalize([dict(document) for document in documents.values()])
    frame = frame.drop(columns=[c for c in frame.columns if c.endswith(SERIES) or ".window_blocks." in c])
    frame.insert(0, "method", [method for _, method in documents])
    frame.insert(0, "model", [model for model, _ in documents])
    return str(frame.to_csv(index=False, lineterminator="\n"))
