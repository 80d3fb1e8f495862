"""One HTML page of tables and pictures that needs nothing else: what a report is sent as."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

_CSS = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { font-size: 1.4rem; margin: 2.8rem 0 .2rem; border-bottom: 2px solid #222; }
h3 { font-size: 1.15rem; margin: 1.8rem 0 .2rem; }
p { margin: .2rem 0 .8rem; color: #555; }
img { max-width: 100%; height: auto; border: 1px solid #e4e4e4; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; max-width: 26rem; word-break: break-word; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .45em; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The page; title: plain text, parts: HTML."""
    head = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_CSS}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text: bool = False) -> str:
    """A table of HTML cells; the callers escape. text: cells are sentences, not numbers."""
    cell = '<td class="text">' if text else "<td>"
    lines = ["<tr>" + "".join(f"<th>{item}</th>" for item in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"{cell}{item}</td>" for item in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def picture(title: str, reading: str, path: Path) -> str:
    """A PNG inside the page, under its title and the sentence that says how to read it."""
    image = base64.b64encode(path.read_bytes()).decode("ascii")
    head = f"<h3>{html.escape(title)}</h3><p>{html.escape(reading)}</p>"
    return f'{head}\n<img alt="{html.escape(title)}" src="data:image/png;base64,{image}">'


def heading(title: str, reading: str) -> str:
    """The head of a section, under which pictures stand."""
    return f"<h2>{html.escape(title)}</h2><p>{html.escape(reading)}</p>"
