"""The house itself: what the folders promise each other, their users and LeRobot."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

# Arrows point one way: what each package may never import (of ours, and LeRobot for the model).
FORBIDDEN_IMPORTS = {
    "modeling_foresight": {
        "lerobot",
        "lerobot_policy_foresight",
        "datasets_scripts",
        "training",
        "hub_cards",
    },
    "datasets_scripts": {"modeling_foresight", "lerobot_policy_foresight", "training", "hub_cards"},
    "training": {"hub_cards"},
    "lerobot_policy_foresight": {"training", "hub_cards"},
}


def imported_packages(file: Path) -> set[str]:
    """Top-level packages that a file imports, at its top or inside its functions."""
    packages = set()
    for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            packages.add(node.module.split(".")[0])
    return packages


def tracked_files() -> list[Path]:
    """Files under version control, or a skip where this is no git checkout."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in names.stdout.split("\0") if name and (ROOT / name).is_file()]


def pinned_versions() -> dict[str, str]:
    """Package name -> version, as constraints.txt pins it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split(";")[0].strip().split("==") for line in lines)


def test_lerobot_finds_the_plugin_by_the_distribution_name():
    # LeRobot imports the module named exactly as a distribution that starts with `lerobot_policy_`.
    name = importlib.metadata.metadata("lerobot_policy_foresight")["Name"]
    assert name == "lerobot_policy_foresight"
    importlib.import_module(name)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_imports(package):
    importlib.import_module(package)


def test_every_folder_with_modules_is_a_package_that_is_installed():
    folders = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for top in {package.split(".")[0] for package in PACKAGES}
        for init in (ROOT / top).rglob("__init__.py")
    }
    assert folders == set(PACKAGES), "list the package in [tool.setuptools] packages of pyproject.toml"


@pytest.mark.parametrize("package", FORBIDDEN_IMPORTS)
def test_imports_point_one_way(package):
    for file in (ROOT / package).rglob("*.py"):
        wrong = imported_packages(file) & FORBIDDEN_IMPORTS[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_model_needs_none_of_its_sub_packages():
    # Exports copy the files beside the model's own into a Hub repo, and nothing deeper.
    model = ROOT / "modeling_foresight"
    assert [init.parent.name for init in model.glob("*/__init__.py")] == ["grmg"]
    for file in model.glob("*.py"):
        assert not re.search(r"(from|import) .*\bgrmg\b", file.read_text()), f"{file.name} imports grmg"


def test_every_requirement_is_pinned_inside_its_range():
    pins = pinned_versions()
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name != canonicalize_name(PROJECT["name"]):
            assert name in pins, f"{name} is not in constraints.txt: run `make constraints`"
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {pins[name]}"


def test_constraints_name_versions_and_no_places():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*==[^\s;]+( ; .+)?", line), line


def test_no_file_names_a_place_on_the_machine_of_its_author():
    # Spelled in pieces, or this file would find itself.
    places = re.compile(
        "|".join(["/ro" + "ot/", "/wo" + "rk/main", "sha" + "red/reference", "sha" + "red/design"])
    )
    for file in tracked_files():
        if file.suffix not in {".png", ".mp4", ".safetensors", ".parquet"}:
            found = places.search(file.read_text(errors="ignore"))
            assert not found, f"{file.relative_to(ROOT)} names {found.group()}"


def test_no_tracked_file_is_large():
    megabyte, shipped = 1024 * 1024, ROOT / "hub_cards" / "models"  # weights to try everything with at once
    large = [
        file.name
        for file in tracked_files()
        if file.stat().st_size > (20 if shipped in file.parents else 2) * megabyte
    ]
    assert not large, "weights, datasets and videos belong on the Hub"


def test_version_and_licence_agree_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == importlib.metadata.version(PROJECT["name"])
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Copyright 2026 The 3D Foresight authors" in (ROOT / "LICENSE").read_text()


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE).group(1).split()
    for target in targets:
        assert re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE), (
            f"`make help` does not explain {target}"
        )


@pytest.mark.parametrize("script", [".ci/run", "scripts/setup.sh"])
def test_shell_scripts_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o100, f"chmod +x {script}"
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
