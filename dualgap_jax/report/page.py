"""The HTML of a report: one file that opens offline, on a desk, on a phone and on paper.

What has the class `screen` needs one and is not printed.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dualgap_jax import terminal

_STYLE = """
:root { --ink:#1a1c20; --soft:#5b616b; --line:#d9dce1; --ground:#fff; --panel:#f6f7f9; --accent:#0b63a5; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8eaee; --soft:#a4abb6; --line:#3a3f48; --ground:#15171b; --panel:#1e2127; --accent:#7ab8ee; }
}
* { box-sizing: border-box; }
body { margin:0 auto; padding:2rem 1.25rem 4rem; max-width:72rem; background:var(--ground); color:var(--ink);
       font:16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size:1.6rem; line-height:1.25; margin:0 0 .3rem; }
h2 { font-size:1.2rem; margin:2.4rem 0 .6rem; border-bottom:1px solid var(--line); padding-bottom:.25rem; }
h3 { font-size:1rem; margin:1.4rem 0 .4rem; }
p, li { max-width:60rem; }
.soft, figcaption { color:var(--soft); font-size:.9rem; }
.badge { display:inline-block; padding:.05rem .55rem; border-radius:1rem; border:1px solid currentColor; }
code, pre { font:.85rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { background:var(--panel); border:1px solid var(--line); border-radius:.4rem; padding:.7rem .9rem; overflow-x:auto;
      white-space:pre-wrap; overflow-wrap:anywhere; }
.wide { overflow-x:auto; }
table { border-collapse:collapse; font-size:.9rem; font-variant-numeric:tabular-nums; }
th, td { padding:.3rem .7rem; text-align:right; border-bottom:1px solid var(--line); white-space:nowrap; }
th { color:var(--soft); font-weight:600; }
th:first-child, td:first-child { text-align:left; padding-left:0; }
.facts td + td { text-align:left; white-space:normal; overflow-wrap:anywhere; }
figure { margin:1rem 0; }
figure img { width:100%; height:auto; background:#fff; border:1px solid var(--line); border-radius:.4rem; }
.pair { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap:1rem; }
.plot { background:#fff; border:1px solid var(--line); border-radius:.4rem; min-height:26rem; overflow:hidden; }
details { margin:.6rem 0; } summary { cursor:pointer; color:var(--accent); }
@media print {
  :root { --ink:#000; --soft:#444; --line:#bbb; --ground:#fff; --panel:#fff; }
  body { max-width:none; padding:0; font-size:10pt; } h2 { break-after:avoid; } figure, tr { break-inside:avoid; }
  figure img { max-height:23cm; object-fit:contain; } .screen { display:none; } .wide { overflow:visible; }
  table { font-size:8pt; } th, td { white-space:normal; padding:.2rem .35rem; }
}
"""


def text(value: Any) -> str:
    """A value as HTML text."""
    return html.escape(str(value), quote=True)


def cell(value: Any, bound: str | None = None) -> str:
    """A cell of a table, as `terminal.cell` writes it, but for what a page has its own signs for."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return text(terminal.cell(value, bound))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], bounds: Mapping[str, str] | None = None) -> str:
    """A table with a head; it scrolls where it is wider than the page.  `bounds` as in `experiments.Report`."""
    head = "".join(f"<th>{text(name)}</th>" for name in columns)
    sides = [(bounds or {}).get(name) for name in columns]
    body = "".join(
        "<tr>" + "".join(f"<td>{cell(value, side)}</td>" for value, side in zip(row, sides, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Mapping[str, Any]) -> str:
    """A table of two columns, without the facts that are None."""
    rows = "".join(f"<tr><td>{text(k)}</td><td>{cell(v)}</td></tr>" for k, v in pairs.items() if v is not None)
    return f'<div class="wide"><table class="facts"><tbody>{rows}</tbody></table></div>'


def paragraphs(lines: Sequence[str]) -> str:
    """Each line in a paragraph of its own."""
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def whole(title: str, body: str, scripts: Sequence[str] = ()) -> str:
    """The page.

    Args:
      title: of the window.
      body: HTML.
      scripts: JavaScript that runs when the body stands, in this order.
    """
    tail = "".join(f"<script>{script}</script>" for script in scripts)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{text(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{body}{tail}</body></html>\n"
    )
