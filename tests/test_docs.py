"""Commands of the README and the docs: their options exist, and each is run somewhere or says why not."""

import argparse
import importlib
import re
import shlex
from pathlib import Path
from string import Template

import pytest
import yaml

from training.config_reading import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
VARIABLE = re.compile(r'^(\w+)=("[^"]*"|\S+)', re.MULTILINE)
# Lines of a shell that run nothing.
NOTHING = re.compile(r'(\w+=("[^"]*"|\S*)|(for|cd|source|export|cat) .*|(--batch_size|RH20T).*|do|done|END)$')
EVIDENCE = yaml.safe_load((ROOT / "tests" / "documented_commands.yaml").read_text())


def commands() -> list[tuple[str, str]]:
    """(page, command) of every shell block, one line each, with the values of the page's variables."""
    found = []
    for page in PAGES:
        text = page.read_text()
        values = {name: value.strip('"') for name, value in VARIABLE.findall(text)}
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            lines = re.sub(r"(^|\s)#\s.*", "", re.sub(r"\\\n\s*", " ", block), flags=re.MULTILINE)
            for command in map(str.strip, re.split(r"&&|;|\n", lines)):
                if command and not NOTHING.fullmatch(command):
                    found.append((page.name, Template(command).safe_substitute(values)))
    return found


class ParsedError(Exception):
    """The options are right."""


@pytest.fixture
def parse(monkeypatch):
    """Reads a command's options as the command itself does, without running it."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *given):
        parse_args(self, *given)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)

    def run(module: str, arguments: list[str]) -> None:
        monkeypatch.setattr("sys.argv", [module, *arguments])
        try:
            importlib.import_module(module).main()
        except ParsedError:
            return
        raise AssertionError("the command did not read its options")

    return run


def our_module(words: list[str]) -> tuple[str, list[str]] | None:
    """The module and the options of `python FILE`, `python -m MODULE` and `accelerate launch ... FILE`."""
    for place, word in enumerate(words):
        file = word.removesuffix(".py").replace("/", ".") if word.endswith(".py") else ""
        module = file or (word if words[place - 1] == "-m" else "")
        if module and (ROOT / module.replace(".", "/")).with_suffix(".py").exists():
            return module, words[place + 1 :]
        if module and (ROOT / module.replace(".", "/") / "__main__.py").exists():
            return f"{module}.__main__", words[place + 1 :]
    return None


def test_commands_have_the_options_that_the_docs_give_them(parse, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as a file, a benchmark finds the others beside it
    wrong = []
    for page, command in commands():
        words = shlex.split(command)
        found = our_module(words)
        try:
            if words[0] == "make":
                assert words[1] in TARGETS, f"no target {words[1]}"
            elif found and "..." not in words:
                module, options = found
                if module == "benchmarks.lerobot_train":
                    continue  # hands its options on to LeRobot
                if module == "training.train":
                    named = ("--resume", "--dry-run", "--skip-flagged")
                    options = [option for option in options if option not in named]
                    config = options.pop(options.index("--config") + 1) if "--config" in options else None
                    load_config(config, [option for option in options if option != "--config"])
                else:
                    parse(module, options)
        except (AssertionError, SystemExit, ValueError) as error:
            wrong.append(f"{page}: {command}\n    {error} {capsys.readouterr().err[-300:]}")
    assert not wrong, "\n".join(wrong)


# Values that need a file or a command beside them; others have weights that are downloaded.
WITH_FILES = {
    "--tracks": ({"delta", "cotracker3"}, "--track-model"),
    "--depth": ({"video-depth-anything", "vda+dav2", "worker"}, "--depth-model"),
}


def test_commands_name_the_files_that_their_models_need():
    wrong = []
    for page, command in commands():
        words = shlex.split(command)
        for option, (values, file) in WITH_FILES.items():
            given = {words[place + 1] for place, word in enumerate(words) if word == option}
            if given & values and not {file, "..."} & set(words):
                wrong.append(f"{page}: {command} lacks {file}")
    assert not wrong, "\n".join(wrong)


def test_every_command_is_run_somewhere_or_says_why_not():
    used = set()
    for page, command in commands():
        start = next((start for start in EVIDENCE if re.match(start, command)), None)
        assert start, f"{page}: add what runs `{command}` to tests/documented_commands.yaml"
        used.add(start)
    assert used == set(EVIDENCE), "these commands are no longer in the docs"
    for evidence in EVIDENCE.values():
        name = evidence.removeprefix("make ")
        known = name in TARGETS if name != evidence else (ROOT / evidence.split(",")[0]).is_file()
        assert known or evidence.startswith("not here: "), evidence
