"""The frame and the style of every HTML page that seqlm writes: one file without network.

    page(title, body, style=..., script=..., allowed=...) -> the text of the file

title is plain text, and is escaped here.  body, style and script are HTML, CSS and JavaScript.
Escape every text in the body with html.escape, and write values into a script with `value`.  The
page asks the browser to refuse every request to the network.

Colours: --ink on --paper, --soft for what is less important, --line for rules, --panel behind
boxes.  They follow the light or dark setting of the browser; print is light.
Classes: `keys` for a legend of <i>, `wide` for a box that scrolls sideways on a narrow screen,
`number` for a cell of a table.
"""

import json
from html import escape
from typing import Any


def page(title: str, body: str, style: str = "", script: str = "", allowed: str = "") -> str:
    """The text of an HTML file; allowed: more that its Content-Security-Policy permits."""
    head = HEAD.format(allowed=allowed)
    head += f"<title>{escape(title)}</title>\n<style>\n{STYLE}{style}</style>\n"
    end = f"<script>\n{script}</script>\n" if script else ""
    return f"{head}{body}{end}</html>\n"


def value(data: Any) -> str:
    """A value from JSON as an expression in a script."""
    return json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")


# the empty icon keeps a browser from asking a server for one
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:;
 {allowed}">
<link rel="icon" href="data:,">
"""
STYLE = """:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif;
  --ink: #1b1b1b; --paper: #fff; --soft: #5a5a5a; --line: #c9c9c9; --panel: #f4f4f4 }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #161616; --soft: #adadad; --line: #4a4a4a; --panel: #222 }
}
@media print { :root { color-scheme: light } }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word }
h1 { font-size: 1.2rem }
h2 { font-size: 1.05rem; margin-top: 2rem; break-after: avoid }
i { font-style: normal }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 1rem/1.7 ui-monospace, monospace }
table { border-collapse: collapse }
th, td { padding: .15rem 1rem .15rem 0; text-align: left; vertical-align: top }
thead th { border-bottom: 1px solid var(--line) }
.number { text-align: right; font-variant-numeric: tabular-nums }
.keys i { padding: 0 .4rem; border-radius: .2rem; white-space: nowrap }
.wide { overflow-x: auto }
svg, img { max-width: 100%; height: auto }
"""
