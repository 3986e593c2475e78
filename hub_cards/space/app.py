"""Show in the browser what a checkpoint sees, expects and does in an episode.

On this machine: `python hub_cards/space/app.py`, then open the address that it prints. As a Space of the Hub:
see `README.md` beside this file. The page needs no internet.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLE = """examples:
  python hub_cards/space/app.py
  python hub_cards/space/app.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="folder or Hub id (default: the shipped one)")
    parser.add_argument("--dataset", help="LeRobot dataset: folder or Hub id (default: the shipped sample)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 serves the network too (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        from hub_cards.space.page import build_page, launch_options
    except ImportError as error:
        sys.exit(f"error: the Space needs {error.name}: pip install 'lerobot_policy_foresight[space,viz]'")
    try:
        checkpoint = args.checkpoint or _find_shipped("models", "config.json")
        dataset = args.dataset or _find_shipped("sample_data", "meta/info.json")
        page = build_page(checkpoint, dataset)
        page.launch(server_name=args.host, server_port=args.port, **launch_options())
    except (ValueError, RuntimeError, OSError, OverflowError) as error:  # the last for a port beyond 65535
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _find_shipped(folder: str, holds: str) -> str:
    """The folder beside this file in a Space, or beside its folder in the project."""
    found = [file for base in (HERE, HERE.parent) for file in sorted((base / folder).glob(f"*/{holds}"))]
    if not found:
        raise ValueError(f"{HERE.parent / folder} is empty: use --checkpoint and --dataset")
    root = found[0].parents[len(Path(holds).parts) - 1]
    return str(root.relative_to(Path.cwd())) if root.is_relative_to(Path.cwd()) else str(root)


if __name__ == "__main__":
    sys.exit(main())
