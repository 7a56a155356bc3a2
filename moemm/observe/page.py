"""One HTML page that needs nothing else: no script, no network, light and dark, wide and narrow.

Every text that comes from a run (names of tasks, modalities, experts) goes through `escape` here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from moemm.observe.colour import Colour, as_hex, ink

STYLE = """
:root{--paper:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--panel:#f6f8fa;--mark:#0b5cad;--second:#b35900}
@media (prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e6e9ec;--soft:#a2abb5;--line:#363c44;--panel:#1c2025;
--mark:#6cb2f5;--second:#f0a35e}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main,header,nav{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:24px}
h1{font-size:1.6rem;margin:0;overflow-wrap:anywhere}h2{font-size:1.25rem;margin:2.4rem 0 .3rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.3rem 0 .8rem;max-width:85ch}.soft{color:var(--soft)}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:.8rem 0}
a{color:var(--mark)}ul.notes{padding-left:1.2rem;max-width:95ch}ul.notes li{margin:.25rem 0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px;margin:.5rem 0 1rem;width:fit-content;
max-width:100%;background:linear-gradient(to left,var(--paper) 30px,transparent) right/60px 100% no-repeat local,
linear-gradient(to left,var(--line),transparent) right/18px 100% no-repeat scroll}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:4px 9px;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child>*{border-bottom:0}
thead th{background:var(--panel);color:var(--soft);font-weight:600;vertical-align:bottom;
white-space:normal;max-width:11rem}
tbody th{font-weight:500;position:sticky;left:0;background:var(--paper);max-width:12rem;overflow:hidden;
text-overflow:ellipsis}
thead th:first-child{position:sticky;left:0;z-index:1}
.n{text-align:right}.c{text-align:center}.faint{color:var(--soft)}.strong{font-weight:700}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:18px 24px;align-items:start}
.grid>*{min-width:0}.flow{display:flex;flex-wrap:wrap;gap:0 28px}.flow>*{max-width:100%}figure{margin:0}
figcaption{font-size:.8rem;color:var(--soft);margin-bottom:2px;overflow-wrap:anywhere}
svg{display:block;width:100%;height:auto;max-width:520px}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
.axis{stroke:var(--line);stroke-width:1}.one{stroke:var(--mark);fill:none;stroke-width:2}.dot{fill:var(--mark)}
.two{stroke:var(--second);fill:none;stroke-width:1.5;stroke-dasharray:5 4}.band{fill:var(--mark);opacity:.16}
.bar{display:inline-block;height:.7em;background:var(--mark);border-radius:2px;margin-right:.5em;min-width:1px}
.scale{display:inline-flex;vertical-align:middle;margin:0 .4em}.scale i{width:14px;height:12px}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 16px;margin:.8rem 0}dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}footer{margin:3rem auto 2rem;max-width:1240px;padding:0 20px;color:var(--soft);
font-size:.85rem}
@media (max-width:600px){main,header,nav,footer{padding-left:14px;padding-right:14px}th,td{padding:4px 7px}
tbody th{max-width:8.5rem}dl{grid-template-columns:1fr}dd{margin-bottom:.35rem}}
@media print{.scroll{overflow:visible;border:0}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """text: plain. colour: of the background. title: what a pointer over it shows. bar: share of a bar before the text.

    align: `l`, `c` or `n` (number, right). strong, faint: how it is set.
    """

    text: str
    colour: Colour | None = None
    title: str = ""
    bar: float | None = None
    align: str = "n"
    strong: bool = False
    faint: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """title: what one sees; lead: how to read it, plain text; body: HTML."""

    key: str
    title: str
    lead: str
    body: str


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]], *, label: str) -> str:
    """A table that scrolls inside its box; the first column holds the rows' names. label: says what it is."""
    found = list(rows)
    aligned = [cell.align for cell in found[0][1]] if found else []
    classes = ["", *(f' class="{align}"' for align in aligned), *[""] * len(head)]
    heads = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, classes, strict=False)
    )  # fmt: skip
    body = "".join(
        f'<tr><th scope="row" title="{escape(name)}">{escape(name)}</th>{"".join(map(_cell, cells))}</tr>'
        for name, cells in found
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(cell: Cell) -> str:
    kinds = [cell.align, *(["strong"] if cell.strong else []), *(["faint"] if cell.faint else [])]
    style = ""
    if cell.colour is not None:
        style = f' style="background:{as_hex(cell.colour)};color:{as_hex(ink(cell.colour))}"'
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    bar = "" if cell.bar is None else f'<span class="bar" style="width:{6 * min(max(cell.bar, 0), 1):.2f}em"></span>'
    return f'<td class="{" ".join(kinds)}"{style}{title}>{bar}{escape(cell.text)}</td>'


def scale(colours: Sequence[Colour], low: str, high: str) -> str:
    """The legend of a colour scale."""
    steps = "".join(f'<i style="background:{as_hex(colour)}"></i>' for colour in colours)
    return f'<p class="soft">{escape(low)}<span class="scale" aria-hidden="true">{steps}</span>{escape(high)}</p>'


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str) -> str:
    """Plain text in a paragraph."""
    return f'<p class="soft">{escape(text)}</p>'


def notes(lines: Sequence[str]) -> str:
    """A list of remarks."""
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>'


def facts(values: Sequence[tuple[str, str]]) -> str:
    """Names and what they are."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in values)}</dl>"


def panels(parts: Iterable[str]) -> str:
    """Parts side by side where there is room."""
    return f'<div class="grid">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def flow(parts: Iterable[str]) -> str:
    """Parts as wide as they need, one behind the other, in as many lines as it takes."""
    return f'<div class="flow">{"".join(f"<div>{part}</div>" for part in parts)}</div>'


def page(title: str, about: str, sections: Sequence[Section], *, footer: str) -> str:
    """The whole document. about: HTML under the title."""
    links = "".join(f'<li><a href="#{one.key}">{escape(one.title)}</a></li>' for one in sections)
    body = "".join(
        f'<section id="{one.key}"><h2>{escape(one.title)}</h2><p>{escape(one.lead)}</p>{one.body}</section>'
        for one in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1>{about}</header><nav aria-label=\"Sections\"><ul>{links}</ul></nav>"
        f"<main>{body}</main><footer>{escape(footer)}</footer></body></html>\n"
    )  # fmt: skip
