"""An installation of the model alone names what the rest needs; `make test-extras` tries it for real."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from datasets_scripts.extras import TRAIN_LIBRARIES

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
IMPORT_NAMES = {"opencv-python-headless": "cv2", "pillow": "PIL", "pyyaml": "yaml"}
PACKAGES = ("datasets_scripts", "goal_images", "training", "hub_cards", "lerobot_policy_foresight")


def test_the_check_knows_every_library_of_the_extra():
    listed = {Requirement(text).name for text in EXTRAS["train"]}
    assert {IMPORT_NAMES.get(name, name) for name in listed} == set(TRAIN_LIBRARIES)


def test_every_extra_is_tried_in_an_environment_of_its_own():
    tried = runpy.run_path(str(ROOT / "scripts" / "test_extras.py"))["TRIED"]
    assert {extra for names in tried for extra in names.split(",")} == {"model", *EXTRAS} - {"dev"}


def test_without_the_extra_every_package_names_it():
    tried = "\n".join(f"try: import {name}\nexcept ImportError as error: print(error)" for name in PACKAGES)
    hidden = f"import sys\nsys.modules |= dict.fromkeys({[*TRAIN_LIBRARIES]!r})\n{tried}"
    run = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(PACKAGES)
    for line in lines:
        assert line.endswith("tqdm): pip install 'lerobot_policy_foresight[train]'") and "(lerobot, " in line


def test_every_advised_extra_exists():
    named = re.compile(r"(?:install_advice\(['\"]|lerobot_policy_foresight\[)([a-z,-]+)")
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    files += [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    found = [names for file in files for names in named.findall(file.read_text())]
    advised = {extra for names in found for extra in names.split(",")}
    assert {"train", "sim", "goal"} < advised <= set(EXTRAS)
