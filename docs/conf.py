"""Sphinx configuration: `make docs`."""

import re
import xml.etree.ElementTree as ET
from html import unescape
from importlib.metadata import version as installed_version

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

project = "mech_align"
author = "mech_align contributors"
copyright = "mech_align contributors, MIT licence"
release = version = installed_version("mech-align")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
root_doc = "index"

myst_enable_extensions = ["dollarmath", "amsmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

html_math_renderer = "mathml"
html_theme = "furo"
html_title = "mech_align"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["equations.css"]

default_role = "code"  # a single backtick means code, as in Markdown

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 90
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "notes"), ("References", "notes")]


_LITERAL = re.compile(r"(``.+?``|`[^`\n]+`|\$\$.+?\$\$|\$[^$\n]+\$)", re.DOTALL)


def _to_rst(text: str) -> str:
    """Docstrings write equations as in Markdown, `$$...$$` and `$...$`; autodoc reads reStructuredText."""

    def block(found: re.Match[str]) -> str:
        indent = found.group(1)
        lines = [line.strip() for line in found.group(2).strip().splitlines()]
        return f"\n{indent}.. math::\n\n" + "\n".join(f"{indent}   {line}" for line in lines) + "\n"

    pieces = _LITERAL.split(text)  # every second one is code or an equation
    pieces[::2] = [re.sub(r"\||(?<=[\[, (])\*(?=\w+[\],)])", r"\\\g<0>", piece) for piece in pieces[::2]]
    text = re.sub(r"^([ \t]*)\$\$(.+?)\$\$[.,;]?[ \t]*$", block, "".join(pieces), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<![\w`$\\])\$([^$\n]+?)\$(?![\w$])", r":math:`\1`", text)


def _process_docstring(_app, _what, _name, _object, _options, lines):
    lines[:] = _to_rst("\n".join(lines)).splitlines()


_MATHML = "http://www.w3.org/1998/Math/MathML"
_ACCENTS = set("ˆ¯˜ˉ˙→^~")


def _to_mathml(tex: str, *, as_block: bool) -> str:
    """TeX to MathML, and what docutils lacks: `\\Big|`, `\\tfrac12`, and an index on an accent (`\\hat e_i`)."""
    ET.register_namespace("", _MATHML)
    tex = re.sub(r"\\[Bb]igg?\|", r"\\vert ", tex)
    tex = re.sub(r"frac(\d)(\d)", r"frac{\1}{\2}", tex)
    text = re.sub(r"&(?!lt;|gt;|amp;)\w+;", lambda name: unescape(name.group()), tex2mathml(tex, as_block=as_block))
    root = ET.fromstring(text)
    for node in list(root.iter(f"{{{_MATHML}}}munderover")):
        base, index, over = node
        if over.text in _ACCENTS:  # docutils hangs the index below the letter
            accented = ET.Element(f"{{{_MATHML}}}mover")
            accented.extend([base, over])
            node[:] = [accented, index]
            node.tag = f"{{{_MATHML}}}msub"
    return ET.tostring(root, encoding="unicode")


def _mathml(self, node, *, as_block):
    """Equations as MathML, which browsers draw by themselves: MathJax would be fetched from the net by every reader."""
    tex = node.astext()
    try:
        self.body.append(_to_mathml(tex, as_block=as_block))
    except MathError as problem:
        logging.getLogger(__name__).warning("equation not understood: %s", problem, location=node)
        self.body.append(f"<code>{self.encode(tex)}</code>")
    raise SkipNode


def _inline_math(self, node):
    _mathml(self, node, as_block=False)


def _block_math(self, node):
    _mathml(self, node, as_block=True)


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(_inline_math, None), block_renderers=(_block_math, None))
    app.connect("autodoc-process-docstring", _process_docstring, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
