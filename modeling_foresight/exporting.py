# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""A policy with the code that runs it, for machines where this package is not installed."""

from pathlib import Path

from .configuration_foresight import ForesightConfig
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor

AUTO_CLASSES = {
    ForesightConfig: "AutoConfig",
    ForesightForActionPrediction: "AutoModel",
    ForesightProcessor: "AutoProcessor",
}


def export_with_code(
    model: ForesightForActionPrediction, processor: ForesightProcessor, folder: str | Path, **options
) -> None:
    """Saves model, processor and the Python files of both, so that the Auto classes load them anywhere.

    ```python
    export_with_code(model, processor, "drawer-policy")
    HfApi().upload_folder(repo_id="me/drawer-policy", folder_path="drawer-policy")
    # on a machine with torch, transformers and timm, but without this package
    model = AutoModel.from_pretrained("me/drawer-policy", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("me/drawer-policy", trust_remote_code=True)
    stream = model.stream(processor)
    ```

    Where the package is installed the same folder loads with the package's own code.

    Args:
        model (`ForesightForActionPrediction`): The policy. Merge adapters first (`merge_and_unload`).
        processor (`ForesightProcessor`): Its processor.
        folder (`str` or `Path`): Where to; made if it is missing. Its last part becomes the name of the
            loaded module: give different models different ones.
        **options: Of `save_pretrained` of the model, for example `max_shard_size="2GB"`.

    Raises:
        TypeError: If `model` or `processor` is wrapped or something else; the message says what it is.
    """
    for given, wanted in ((model, ForesightForActionPrediction), (processor, ForesightProcessor)):
        if not isinstance(given, wanted):
            raise TypeError(
                f"export_with_code takes a {wanted.__name__}, not a {type(given).__name__}. Unwrap it first: "
                "merge_and_unload() for adapters, accelerator.unwrap_model(...) for distributed training."
            )
    try:
        for cls, auto_class in AUTO_CLASSES.items():
            cls.register_for_auto_class(auto_class)
        model.save_pretrained(folder, **options)
        processor.save_pretrained(folder)
    finally:
        # Otherwise every later `save_pretrained` would write code, or name code that it does not write.
        for cls in AUTO_CLASSES:
            cls._auto_class = None
        for part in (model.config, processor):
            vars(part).pop("auto_map", None)


__all__ = ["export_with_code"]
