"""Executed notebooks as HTML that asks no other host for anything: formulas are pictures, no script is left."""

import base64
import io
import re
from collections.abc import Mapping
from functools import lru_cache
from html import escape
from pathlib import Path

import matplotlib
import nbformat
from jinja2 import DictLoader
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import MathTextParser, math_to_image
from nbconvert import HTMLExporter

from tgazsr_utils.runtime.files import write_atomic

# nbconvert's own page without require.js, MathJax, mermaid and the widgets' renderer, which come from other hosts.
_TEMPLATE = """{% extends 'lab/index.html.j2' %}
{% block html_head_js %}{% endblock %}
{% block jupyter_widgets %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>
nav.run { display: flex; gap: 1.5em; padding: 0.75em 1em; font-family: var(--jp-ui-font-family); }
.jp-OutputArea-output { overflow-x: auto; }
</style>{% endblock %}
{% block body_header %}{{ super() }}{{ resources.links }}{% endblock %}"""
_CODE_OR_FORMULA = re.compile(
    r"```.*?```|`[^`\n]*`|\$\$(?P<block>.+?)\$\$|(?<![\\$])\$(?P<inline>[^$\n]+?)\$", re.DOTALL
)
_ALIAS = {r"\lVert": r"\Vert", r"\rVert": r"\Vert", r"\le": r"\leq", r"\ge": r"\geq"}  # as matplotlib calls them
_ALIASES = re.compile(rf"({'|'.join(map(re.escape, _ALIAS))})(?![a-zA-Z])")
_SIZE = 12  # points, of the text that formulas stand in


def export(executed: Path, target: Path, links: Mapping[str, str] = {}) -> None:
    """Writes the HTML of an executed notebook; ``links``: words -> address, to other pages, on top."""
    book = nbformat.read(executed, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = _CODE_OR_FORMULA.sub(_drawn, cell.source)
    to = " ".join(f'<a href="{escape(address)}">{escape(words)}</a>' for words, address in links.items())
    loaders = [DictLoader({"page.html.j2": _TEMPLATE})]
    exporter = HTMLExporter(extra_loaders=loaders, template_file="page.html.j2")
    about = {"metadata": {"name": executed.stem}, "links": f'<nav class="run">{to}</nav>' if to else ""}
    html, _ = exporter.from_notebook_node(book, about)
    write_atomic(target, lambda temporary: temporary.write_text(html, encoding="utf-8"))


def _drawn(found: re.Match) -> str:
    """A formula as a picture whose words are its LaTeX; code, and what is none to matplotlib, as it stands."""
    formula = found["block"] or found["inline"]
    try:
        picture = _picture(" ".join(formula.split())) if formula else found[0]
    except ValueError:
        return found[0]
    return f'\n<div style="overflow-x: auto">{picture}</div>\n' if found["block"] else picture


@lru_cache(maxsize=256)
def _picture(formula: str) -> str:
    text = f"${_ALIASES.sub(lambda found: _ALIAS[found[0]] + ' ', formula)}$"
    font, drawn = FontProperties(size=_SIZE), io.BytesIO()
    _, height, depth, *_ = MathTextParser("path").parse(text, dpi=72, prop=font)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever a matplotlibrc of one's own says
        math_to_image(text, drawn, prop=font, dpi=72, format="svg")
    data = base64.b64encode(drawn.getvalue()).decode()
    place = f"height: {height / _SIZE:.3f}em; vertical-align: {-depth / _SIZE:.3f}em; max-width: none"
    return f'<img style="{place}" alt="{escape(formula)}" src="data:image/svg+xml;base64,{data}">'
