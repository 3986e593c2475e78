"""The optional parts of the installation: the command that adds one, and the check for the largest."""

import importlib.util

__all__ = ["TRAIN_LIBRARIES", "install_advice", "require_train"]

# Importable names of what the extra `train` lists in pyproject.toml.
TRAIN_LIBRARIES = ("lerobot", "accelerate", "peft", "datasets", "pyarrow", "cv2", "filelock", "httpx", "av")
TRAIN_LIBRARIES += ("PIL", "psutil", "jinja2", "evaluate", "yaml", "tqdm")


def install_advice(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'lerobot_policy_foresight[{extra}]'"


def require_train() -> None:
    """Refuses an installation of the model alone.

    Raises:
        ImportError: If a library of the extra `train` is missing; names it and the command that installs it.
    """
    missing = [name for name in TRAIN_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"All but the model needs more libraries ({', '.join(missing)}): {install_advice('train')}",
            name=missing[0],
        )
