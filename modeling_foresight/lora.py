# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""What LoRA adapts in 3D Foresight by default, declared once for `peft`, the trainer and LeRobot's plugin.

`get_peft_model(model, lora_config(model, r=16))` uses all of it; a plain `LoraConfig(r=16)` has the
targets alone. `peft` is imported only by whoever asks for an adapter.
"""

import re
import sys

from .heads import DECODERS

TOWERS = r"(.*\.)?(text|vision)_encoder(\..*)?"
# The linear layers of the transformer and of the blocks of every decoder and of the action encoder. Towers
# have layers of the same names, hence the lookahead. A prefix is allowed, because LeRobot wraps the model.
LORA_TARGETS = (
    rf"(?!{TOWERS}$)(.*\.)?"
    r"(layers\.\d+\.(self_attn\.[qkvo]_proj|(up|down)_proj)"
    r"|\w+_(encoder|decoder)\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    r"|action_decoder\.shared\.\d+)"  # GR-1's linear head
)
# What touches the robot's own numbers is small and learnt in full.
LORA_MODULES_TO_SAVE = (
    "embed_state",
    "action_decoder.predict_continuous",
    "action_decoder.predict_binary",
)
# How names start in the model itself. LeRobot's policy, and so the adapters it saves, put one more `model.`
# before them; peft, which reads `_checkpoint_conversion_mapping`, takes either kind of adapter for either.
TOP_LEVEL = rf"(model|{'|'.join(DECODERS)})\."
FROM_LEROBOT = {rf"^model\.(?={TOP_LEVEL})": ""}


def lora_config(
    model,
    r: int = 16,
    target_modules: str | list[str] | None = None,
    modules_to_save: list[str] | None = None,
    **options,
):
    """The `peft.LoraConfig` of a model.

    Args:
        model (`ForesightForActionPrediction`): The base. One from the Hub is named with its commit.
        r (`int`): Rank; `lora_alpha` equals it by default.
        target_modules (`str` or `list[str]`, *optional*): Pattern for whole names of layers, or ends of
            names; `LORA_TARGETS` by default. Layers of the towers are left out in any case.
        modules_to_save (`list[str]`, *optional*): Ends of names of modules that are learnt in full; those of
            `LORA_MODULES_TO_SAVE` that exist by default, none if empty.
        **options: Other fields of `peft.LoraConfig`.

    Returns:
        `peft.LoraConfig`: For `peft.get_peft_model`.

    Raises:
        ImportError: If `peft` is not installed.
        ValueError: If a given name is in no part of the model; names it.
    """
    try:  # inside `try`, or a model with custom code would not load without peft
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    names = [name for name, _ in model.named_modules()]
    defaults = [leaf for leaf in LORA_MODULES_TO_SAVE if any(name.endswith(leaf) for name in names)]
    saved = defaults if modules_to_save is None else list(modules_to_save)
    for leaf in saved:
        if not any(name.endswith(leaf) for name in names):
            raise ValueError(f"modules_to_save names {leaf!r}, but no module's name ends so.")
    if target_modules is not None:
        options["exclude_modules"] = TOWERS
        own = [name for name in names if not re.fullmatch(TOWERS, name)]
        if target_modules == "all-linear":
            missing = []
        elif isinstance(target_modules, str):
            missing = [] if any(re.fullmatch(target_modules, name) for name in own) else [target_modules]
        else:
            missing = [t for t in target_modules if not any(f".{name}".endswith(f".{t}") for name in own)]
        if missing:
            raise ValueError(
                f"target_modules has {missing}, but no layer outside the towers is called so. A list holds "
                "ends of names such as 'self_attn.q_proj', a string is a pattern for whole names."
            )
    options = {"lora_alpha": r, "revision": getattr(model.config, "_commit_hash", None), **options}
    return LoraConfig(
        r=r, target_modules=target_modules or LORA_TARGETS, modules_to_save=saved or None, **options
    )


def declare_lora_targets() -> None:
    """Tells `peft`, if it has been imported, what a `LoraConfig` without targets means for this model."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is not None:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("foresight", LORA_TARGETS)


__all__ = [
    "FROM_LEROBOT",
    "LORA_MODULES_TO_SAVE",
    "LORA_TARGETS",
    "TOP_LEVEL",
    "TOWERS",
    "declare_lora_targets",
    "lora_config",
]
