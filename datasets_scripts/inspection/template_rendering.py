"""Fill in the Jinja templates of cards, pages and reports.

Fields are texts of strangers: names and instructions of datasets, settings of models. Whatever a template
prints is escaped for its kind: HTML, Markdown, or a line of plain text. Filters say where Markdown holds
code, and `safe` passes what was made here.
"""

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

__all__ = ["as_code", "render_template"]

# Line breaks of any kind, other control characters, and those that reverse the direction of a text.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")
MARKDOWN = re.compile(r"[\\`*\[\]|~${]|(?<!\w)_|_(?!\w)")


def render_template(path: Path, **fields: Any) -> str:
    """The text of a template; a field that is missing is an error, never an empty place.

    Raises:
        UndefinedError: If a field is missing; names it.
    """
    return _load_environment(path.parent, path.suffix).get_template(path.name).render(fields)


@functools.cache
def _load_environment(folder: Path, suffix: str) -> Environment:
    html = suffix == ".html"
    options = dict.fromkeys(("autoescape", "trim_blocks", "lstrip_blocks"), html)
    finalize = {".html": None, ".md": _escape_markdown}.get(suffix, _as_line)
    environment = Environment(
        undefined=StrictUndefined,
        loader=FileSystemLoader(folder),
        keep_trailing_newline=not html,
        finalize=finalize,
        **options,
    )
    environment.filters |= {"code": as_code, "command": _as_command, "literal": _as_literal, "word": _as_word}
    return environment


def _as_line(value: Any) -> str:
    return CONTROLS.sub(" ", str(value))


def _escape_markdown(value: Any) -> str:
    """A text as a part of a line of prose or of a table's cell."""
    if isinstance(value, Markup):
        return value
    return Markup(MARKDOWN.sub(r"\\\g<0>", _as_line(value)).replace("<", "&lt;"))


def as_code(value: Any) -> Markup:
    """A text as code inside a line of Markdown, or inside a table's cell."""
    return Markup("`{}`").format(Markup(_as_line(value).replace("`", "'").replace("|", r"\|")))


def _as_command(value: Any) -> Markup:
    """A command line in a block of code, which it cannot close."""
    return Markup(_as_line(value).replace("```", "'''"))


def _as_literal(value: Any) -> Markup:
    """A text of a Python program, quoted."""
    quoted = json.dumps(str(value), ensure_ascii=False)
    return Markup(CONTROLS.sub(lambda found: json.dumps(found[0])[1:-1], quoted))


def _as_word(value: Any) -> Markup:
    """A single argument of a command line."""
    return Markup(shlex.quote(_as_command(value)))
