# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Default LoRA targets of 3D Foresight, for `peft`, the trainer and LeRobot's plugin.

`get_peft_model(model, lora_config(model, r=16))` uses all of it; a plain `LoraConfig(r=16)` has only the
targets. `peft` is imported only when an adapter is made.
"""

import re
import sys

from torch import nn

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
# Modules whose units depend on the robot are small and learned in full.
LORA_MODULES_TO_SAVE = ("embed_state", "action_decoder.predict_continuous", "action_decoder.predict_binary")
# How names start in the model itself. LeRobot's policy, and so its adapters, put one more `model.` before
# them; peft, which reads `_checkpoint_conversion_mapping`, loads either kind of adapter into either.
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
            names; `LORA_TARGETS` by default. Layers of the towers are always left out.
        modules_to_save (`list[str]`, *optional*): Ends of names of modules that are learned in full; by
            default those of `LORA_MODULES_TO_SAVE` that exist, none if empty.
        **options: Other fields of `peft.LoraConfig`.

    Raises:
        ValueError: If no module has a given name, which the message names.
    """
    try:  # inside `try`, or a model with custom code would not load without peft
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install peft") from error
    modules = dict(model.named_modules())
    names = list(modules)
    defaults = [leaf for leaf in LORA_MODULES_TO_SAVE if any(name.endswith(leaf) for name in names)]
    saved = defaults if modules_to_save is None else list(modules_to_save)
    for leaf in saved:
        if not any(name.endswith(leaf) for name in names):
            raise ValueError(f"modules_to_save has {leaf!r}, but no module's name ends with it.")
        for name in filter(lambda name: name.endswith(leaf), names):
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                parts = [f"{leaf}.{part}" for part, _ in modules[name].named_children()]
                raise ValueError(
                    f"modules_to_save has {leaf!r}, which is a list of modules and not one that peft can "
                    f"learn in full: name {' and '.join(parts) or 'other modules'}."
                )
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
                f"target_modules has {missing}, but no layer outside the towers has that name. A list holds "
                "ends of names such as 'self_attn.q_proj', a string is a pattern for whole names."
            )
    options = {"lora_alpha": r, "revision": getattr(model.config, "_commit_hash", None), **options}
    return LoraConfig(
        r=r, target_modules=target_modules or LORA_TARGETS, modules_to_save=saved or None, **options
    )


def declare_lora_targets() -> None:
    """Sets the default targets of `LoraConfig` for this model, if `peft` is imported."""
    constants = sys.modules.get("peft.utils.constants")
    if constants is not None:
        constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("foresight", LORA_TARGETS)
