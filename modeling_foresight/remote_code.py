# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""Saves a policy with the code that runs it, for machines where this package is not installed."""

import json
import shutil
import sys
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .configuration_foresight import ForesightConfig
from .modeling_foresight import ForesightForActionPrediction
from .processing_foresight import ForesightProcessor

# What `save_pretrained` writes, and the classes that read it.
AUTO_MAPS = {
    "config.json": {"AutoConfig": ForesightConfig, "AutoModel": ForesightForActionPrediction},
    "processor_config.json": {"AutoProcessor": ForesightProcessor},
}


def export_with_code(
    model: ForesightForActionPrediction, processor: ForesightProcessor, folder: str | Path, **options
) -> None:
    """Saves model, processor and the Python files of both, so that the Auto classes load them anywhere.

    ```python
    export_with_code(model, processor, "drawer-policy")
    HfApi().upload_folder(repo_id="me/drawer-policy", folder_path="drawer-policy")
    # on a machine with torch, transformers and timm, without this package
    model = AutoModel.from_pretrained("me/drawer-policy", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained("me/drawer-policy", trust_remote_code=True)
    stream = model.stream(processor)
    ```

    Where the package is installed, the same folder loads with the package's code.

    Args:
        model (`ForesightForActionPrediction`): The policy. Merge adapters first (`merge_and_unload`).
        processor (`ForesightProcessor`): Its processor.
        folder (`str` or `Path`): Destination, created if missing. Its last part becomes the name of the
            loaded module: give different models different ones.
        **options: Of `save_pretrained` of the model, for example `max_shard_size="2GB"`.

    Raises:
        TypeError: If `model` or `processor` is wrapped or of another class, which the message names.
    """
    for given, wanted in ((model, ForesightForActionPrediction), (processor, ForesightProcessor)):
        if type(given) is not wanted:  # a subclass has code that is not sent
            raise TypeError(
                f"export_with_code takes a {wanted.__name__}, not a {type(given).__name__}. Unwrap it first: "
                "merge_and_unload() for adapters, accelerator.unwrap_model(...) for distributed training."
            )
    model.save_pretrained(folder, **options)
    processor.save_pretrained(folder)
    add_code(folder)


def add_code(folder: str | Path) -> None:
    """Adds the Python files to a folder with a saved model and processor; its JSON files name the classes."""
    folder = Path(folder)
    for name, classes in AUTO_MAPS.items():
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {
            auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()
        }
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        for cls in classes.values():
            own = sys.modules[cls.__module__].__file__
            for file in (own, *get_relative_import_files(own)):
                shutil.copyfile(file, folder / Path(file).name)
