"""Installs the wheel with one extra after another, each in its own environment, and tries what it is for.

The tests of a part run from a copy outside of this checkout, so that they import what the wheel installed. No
constraints: a stranger gets the newest versions that pyproject.toml allows.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENTS = ROOT / ".venv-extras"
COPIED = ("tests", "setup.cfg", "pyproject.toml", "hub_cards/models", "hub_cards/sample_data", "examples")

MODEL = "model"  # no extra; tried by try_model.py
# Extra -> what pytest runs
SIMULATION, PLUGIN = "tests/datasets_scripts/simulation", "tests/lerobot_policy_foresight"
TESTS = {
    "train": "tests/training/test_loop.py tests/training/windows tests/hub_cards/cards",
    "lerobot": f"{PLUGIN}/test_policy.py {PLUGIN}/test_training.py",
    "sim": f"{SIMULATION}/test_metaworld.py {PLUGIN}/test_environments.py",
    "libero,libero-assets": f"-m slow {SIMULATION}/test_libero.py",
    "annotate": "tests/datasets_scripts/annotation tests/datasets_scripts/tracks",
    "convert": "tests/datasets_scripts/conversion/test_libero.py",
    "goal": "tests/goal_images",
    "async": f"{PLUGIN}/test_policy_server.py",
    "viz": "tests/datasets_scripts/inspection tests/training/test_visualize.py",
    "space": "tests/hub_cards/space",
    "deepspeed": "-m slow -k zero tests/training/engines",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if an installation does not work."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", default=[MODEL, *TESTS], help=f"default: {MODEL} and all extras")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--uv", default="uv")
    args = parser.parse_args(arguments)
    unknown = set(args.extras) - {MODEL, *TESTS}
    if unknown:
        parser.error(f"unknown extras {sorted(unknown)}; there are {MODEL} (alone), {' '.join(TESTS)}")
    uv = str(Path(shutil.which(args.uv)).absolute())
    failed = [extra for extra in args.extras if not works(extra, args.wheel.resolve(), uv)]
    print(f"failed: {' '.join(failed)}" if failed else f"{len(args.extras)} installations work")
    return bool(failed)


def works(extra: str, wheel: Path, uv: str) -> bool:
    """Makes the environment of an extra, prints what that costs, and tries it."""
    environment = ENVIRONMENTS / extra.replace(",", "+")
    python = environment / "bin" / "python"
    wanted = [str(wheel)] if extra == MODEL else [f"{wheel}[{extra}]", "pytest", "pytest-xdist"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="foresight-extra-") as outside:
        # From outside, or uv would follow this project's own overrides.
        make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment]
        subprocess.run(make, check=True, cwd=outside)
        subprocess.run(
            [uv, "pip", "install", "--quiet", "--python", python, *wanted], check=True, cwd=outside
        )
        print(f"== {extra}: installed in {time.monotonic() - started:.0f} s", flush=True)
        if extra == MODEL:
            tried = [python, "-I", ROOT / "scripts" / "try_model.py", ROOT / "hub_cards" / "models"]
        else:
            for name in COPIED:
                place = Path(outside) / name
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place)
            # Of two -m, the last one counts.
            tried = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow", *TESTS[extra].split()]
        path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(tried, cwd=outside, env=os.environ | {"PATH": path}).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
