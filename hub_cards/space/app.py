"""Show in the browser what a checkpoint sees, expects and does in an episode.

On this machine: `python hub_cards/space/app.py`, then open the address that it prints. As a Space of the Hub:
see `README.md` beside this file. The page needs no internet.

Where others can reach the page, they may open what is public on the Hub and what the options name, nothing
else of this machine or of its Hub account.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets_scripts.command_line import EXPECTED_ERRORS, entry_point
from datasets_scripts.extras import install_advice

HERE = Path(__file__).resolve().parent
EXAMPLE = """examples:
  python hub_cards/space/app.py
  python hub_cards/space/app.py --checkpoint outputs/quickstart/model --dataset outputs/quickstart/dataset"""


# The last one for a port beyond 65535.
@entry_point(errors=(*EXPECTED_ERRORS, OverflowError))
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default=os.getenv("FORESIGHT_CHECKPOINT"),
        help="folder or Hub id (default: $FORESIGHT_CHECKPOINT, or the shipped one)",
    )
    parser.add_argument(
        "--dataset",
        default=os.getenv("FORESIGHT_DATASET"),
        help="LeRobot dataset: folder or Hub id (default: $FORESIGHT_DATASET, or the shipped sample)",
    )
    parser.add_argument(
        "--host",
        help="0.0.0.0 serves the network too (default: $GRADIO_SERVER_NAME, which Spaces set, or 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860)")
    args = parser.parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    public = _is_public(args.host)
    if public:  # read when huggingface_hub is imported
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    try:
        from hub_cards.space.page import build_page, launch_options
    except ImportError as error:
        raise RuntimeError(f"the Space needs {error.name}: {install_advice('space')}") from error
    models = [] if args.checkpoint else _find_shipped("models", "config.json")
    datasets = [] if args.dataset else _find_shipped("sample_data", "meta/info.json")
    samples = [_describe_sample(name, models) for name in datasets]
    known = [sample.checkpoint for sample in samples if sample.checkpoint]  # fit the shipped datasets
    checkpoint, dataset = args.checkpoint or (known + models)[0], args.dataset or datasets[0]
    chosen = {checkpoint: "model", dataset: "dataset", **dict.fromkeys(datasets, "dataset")}
    chosen |= {sample.checkpoint: "model" for sample in samples if sample.checkpoint}
    folders = {name: _fetch(name, kind) for name, kind in chosen.items()} if public else None
    page = build_page(checkpoint, dataset, folders, samples)
    page.launch(server_name=args.host, server_port=args.port, **launch_options())


def _is_public(host: str | None) -> bool:
    """Whether others than this machine's users can open the page."""
    host = host or os.getenv("GRADIO_SERVER_NAME", "127.0.0.1")
    shared = "SPACE_ID" in os.environ or os.getenv("GRADIO_SHARE", "").lower() == "true"
    return shared or host not in ("127.0.0.1", "localhost", "::1", "[::1]")


def _fetch(name: str, repo_type: str) -> str:
    """The folder of what the owner chose; only this download uses the account's token."""
    from huggingface_hub import get_token, snapshot_download

    from datasets_scripts.storage.hub.download import explain_hub_errors

    if Path(name).expanduser().exists():
        return name
    repo_id, _, revision = name.partition("@")
    with explain_hub_errors(repo_id, repo_type):
        return snapshot_download(
            repo_id, repo_type=repo_type, revision=revision or None, token=get_token() or False
        )


def _find_shipped(folder: str, holds: str) -> list[str]:
    """The folders beside this file in a Space, or beside its folder in the project."""
    found = [file for base in (HERE, HERE.parent) for file in sorted((base / folder).glob(f"*/{holds}"))]
    if not found:
        raise ValueError(f"{HERE.parent / folder} is empty: use --checkpoint and --dataset")
    roots = [file.parents[len(Path(holds).parts) - 1] for file in found]
    here = Path.cwd()
    return [str(root.relative_to(here)) if root.is_relative_to(here) else str(root) for root in roots]


def _describe_sample(dataset: str, models: Sequence[str]):
    """A shipped dataset as the page offers it; what a policy did itself goes with that policy."""
    from datasets_scripts.storage.provenance import read_provenance
    from hub_cards.space.page import Sample

    policy = read_provenance(dataset).get("simulation", {}).get("policy")
    kind = "what the policy did itself" if policy else "demonstrations"
    same = [name for name in models if policy and Path(name).name == Path(policy["path"]).name]
    return Sample(f"{Path(dataset).name}: {kind}", dataset, *same[:1])


if __name__ == "__main__":
    sys.exit(main())
