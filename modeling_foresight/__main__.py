"""Prints the variants of the method side by side: `python -m modeling_foresight`."""

import argparse

import torch

from .attention_mask import build_layout
from .configuration_foresight import PRESETS, ForesightConfig
from .modeling_foresight import ForesightForActionPrediction

COLUMNS = ("preset", "tokens", "per frame", "trained", "all", "to act", "objectives")


def describe_variant(name: str) -> dict[str, int | str]:
    """Size of a preset at the paper's size; nothing is allocated.

    Returns:
        `dict`: `preset`, `tokens` of a whole window, `per frame`, `trained` and `all` parameters, parameters
            of the policy `to act` (`auxiliary_heads=False`; 0 if it has no actions), and `objectives`.
    """
    config = ForesightConfig.from_preset(name)
    tokens = [len(build_layout(config, frames)) for frames in (1, 2, config.history_length)]
    trained, total = _count_parameters(config)
    to_act = 0
    if config.has("action"):
        to_act = _count_parameters(ForesightConfig.from_preset(name, auxiliary_heads=False))[1]
    values = (name, tokens[2], tokens[1] - tokens[0], trained, total, to_act, " ".join(config.objectives))
    return dict(zip(COLUMNS, values, strict=True))


def _count_parameters(config: ForesightConfig) -> tuple[int, int]:
    """Trained parameters, and all."""
    with torch.device("meta"):
        parameters = list(ForesightForActionPrediction(config).parameters())
    return tuple(sum(p.numel() for p in parameters if p.requires_grad or every) for every in (False, True))


def main() -> None:
    """Prints the table; counts in full, so that two variants can be subtracted."""
    parser = argparse.ArgumentParser(
        prog="python -m modeling_foresight",
        description="Variants of the method at the paper's size: tokens in a window of T frames, parameters "
        "that are trained (the towers are frozen), in all, and of the policy that only acts.",
        epilog="example: python -m modeling_foresight --presets grmg foresight_3d",
    )
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    variants = [describe_variant(name) for name in parser.parse_args().presets]
    for variant in (dict(zip(COLUMNS, COLUMNS, strict=True)), *variants):
        name, *numbers, objectives = (
            f"{value:,}" if isinstance(value, int) and value else str(value or "-")
            for value in variant.values()
        )
        print(f"{name:25}", *(f"{number:>11}" for number in numbers), f" {objectives}")


if __name__ == "__main__":
    main()
