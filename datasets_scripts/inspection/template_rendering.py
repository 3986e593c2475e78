"""Fill in the Jinja templates of cards, pages and reports."""

import functools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["render_template"]


def render_template(path: Path, **fields: Any) -> str:
    """The text of a template; a field that is missing is an error, never an empty place.

    Raises:
        UndefinedError: If a field is missing; names it.
    """
    return _load_environment(path.parent, path.suffix == ".html").get_template(path.name).render(fields)


@functools.cache
def _load_environment(folder: Path, html: bool) -> Environment:
    options = dict.fromkeys(("autoescape", "trim_blocks", "lstrip_blocks"), html)
    loader = FileSystemLoader(folder)
    return Environment(undefined=StrictUndefined, loader=loader, keep_trailing_newline=not html, **options)
