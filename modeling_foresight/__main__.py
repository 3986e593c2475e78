"""Prints the variants of the method side by side: `python -m modeling_foresight`."""

import argparse

import torch

from .attention_mask import build_layout
from .configuration_foresight import PRESETS, ForesightConfig
from .modeling_foresight import ForesightForActionPrediction

COLUMNS = ("preset", "tokens", "per frame", "trained", "all", "to act", "objectives")


def describe_variant(name: str) -> dict[str, int | str]:
    """Size of a preset at the paper's size; nothing is allocated.

    Args:
        name (`str`): One of `PRESETS`.

    Returns:
        `dict`: `tokens` of a whole window, `per frame`, `trained` and `all` parameters, parameters of the
            policy `to act` (`auxiliary_heads=False`; 0 if it has no actions), and `objectives`.
    """
    config = ForesightConfig.from_preset(name)
    counts = {"all": _parameters(config)}
    counts["trained"] = _parameters(config, trained=True)
    counts["to act"] = _parameters(_acting(name)) if config.has("action") else 0
    first, both = (len(build_layout(config, frames)) for frames in (1, 2))
    return {
        "preset": name,
        "tokens": len(build_layout(config, config.history_length)),
        "per frame": both - first,
        **counts,
        "objectives": " ".join(config.objectives),
    }


def _acting(name: str) -> ForesightConfig:
    return ForesightConfig.from_preset(name, auxiliary_heads=False)


def _parameters(config: ForesightConfig, trained: bool = False) -> int:
    with torch.device("meta"):
        model = ForesightForActionPrediction(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def main() -> None:
    """Prints the table; counts in full, so that two variants can be subtracted."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_foresight",
        description="Variants of the method at the paper's size: tokens in a window of T frames, parameters "
        "that are trained (the towers are frozen), in all, and of the policy that only acts.",
        epilog="example: python -m modeling_foresight --presets grmg foresight_3d",
    )
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    rows = [describe_variant(name) for name in parser.parse_args().presets]
    table = [COLUMNS, *(tuple(_text(row[column]) for column in COLUMNS) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    for row in table:
        left, numbers, last = row[0], row[1:-1], row[-1]
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
        print("  ".join([left.ljust(widths[0]), *cells, last]))


def _text(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) and value else str(value or "-")


if __name__ == "__main__":
    main()
