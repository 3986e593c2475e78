"""Hook of MkDocs (mkdocs.yml): the README is the first page, and links out of docs/ lead to GitHub."""

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")  # ](PLACE#PART), without links to other sites


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Called by MkDocs for every page; a link to a missing file stops the build."""
    page_file = Path(page.file.abs_src_path)
    source = ROOT / "README.md" if page.file.src_uri == "index.md" else page_file

    def lead(link: re.Match) -> str:
        target = (source.parent / link[2]).resolve()
        if not target.exists():
            raise PluginError(f"{source.relative_to(ROOT)} links to {link[2]}, which does not exist.")
        if ROOT / "docs" in target.parents:
            return link[1] + os.path.relpath(target, page_file.parent) + link[3]
        return f"{link[1]}{config.repo_url}/blob/main/{target.relative_to(ROOT)}{link[3]}"

    return LINK.sub(lead, source.read_text() if source != page_file else markdown)
