"""Installs the wheel with one extra after another, each in its own environment, and tries what it is for.

The tests of a part run from a copy outside of this checkout, so that they import what the wheel installed. No
constraints: a stranger gets the newest versions that pyproject.toml allows.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-extras"
COPIED = ("tests", "setup.cfg", "pyproject.toml", "CITATION.cff", "examples", "training/configs")
COPIED += ("hub_cards/models", "hub_cards/sample_data")

PYTEST = "-m pytest -q -n 2 -m 'not slow'"  # of two -m, the last one counts
SIMULATION, PLUGIN = "tests/datasets_scripts/simulation", "tests/lerobot_policy_foresight"
# Extra -> what Python runs in a copy of COPIED; the first is the model alone.
TRIED = {  # shipped models and samples are not in the wheel
    "model": f"-I {ROOT}/scripts/try_model.py {ROOT}/hub_cards/models",
    "train": f"{PYTEST} tests/training/test_loop.py tests/training/windows tests/hub_cards/cards",
    "lerobot": f"{PYTEST} {PLUGIN}/test_policy.py {PLUGIN}/test_training.py",
    "sim": f"{PYTEST} {SIMULATION}/test_metaworld.py {PLUGIN}/test_environments.py",
    "libero,libero-assets": f"{PYTEST} -m slow {SIMULATION}/test_libero.py",
    "annotate": f"{PYTEST} tests/datasets_scripts/annotation tests/datasets_scripts/tracks",
    "convert": f"{PYTEST} tests/datasets_scripts/conversion/test_libero.py",
    "goal": f"{PYTEST} tests/goal_images",
    "async": f"{PYTEST} {PLUGIN}/test_policy_server.py",
    "viz": f"{PYTEST} tests/datasets_scripts/inspection tests/training/test_visualize.py",
    "space": f"{PYTEST} -k 'not shipped and not listens' tests/hub_cards/space",
    "deepspeed": f"{PYTEST} -m slow -k zero tests/training/engines",
    "export": f"{PYTEST} -m 'not slow or exports' tests/modeling_foresight/test_export.py",
    "docs": f"-m mkdocs build --strict --config-file {ROOT}/mkdocs.yml",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if an installation does not work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", default=[*TRIED], help="default: all")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--uv", default="uv")
    args = parser.parse_args(arguments)
    unknown = set(args.extras) - set(TRIED)
    if unknown:
        parser.error(f"unknown extras {sorted(unknown)}; there are {' '.join(TRIED)}")
    uv = str(Path(shutil.which(args.uv)).absolute())
    failed = [extra for extra in args.extras if not works(extra, args.wheel.resolve(), uv)]
    print(f"failed: {' '.join(failed)}" if failed else f"{len(args.extras)} installations work")
    return bool(failed)


def works(extra: str, wheel: Path, uv: str) -> bool:
    """Makes the environment of an extra, prints what that costs, and tries it."""
    environment = ENVIRONMENTS / extra.replace(",", "+")
    python = environment / "bin" / "python"
    wanted = [str(wheel) if extra == "model" else f"{wheel}[{extra}]"]
    wanted += ["pytest", "pytest-xdist"] if PYTEST in TRIED[extra] else []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foresight-extra-") as outside:
        # From outside, or uv would follow this project's own overrides.
        make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment]
        subprocess.run(make, check=True, cwd=outside)
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True, cwd=outside
        )
        print(f"== {extra}: installed in {time.monotonic() - started:.0f} s", flush=True)
        for name in COPIED:
            place = Path(outside) / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                without = shutil.ignore_patterns("__init__.py") if name.startswith("training") else None
                shutil.copytree(ROOT / name, place, ignore=without)  # no package beside the installed one
            else:
                shutil.copy(ROOT / name, place)
        tried = [python, *shlex.split(TRIED[extra])]
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(tried, cwd=outside, env=os.environ | {"PATH": path}).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
