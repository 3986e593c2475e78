# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""The versions of LeRobot that this plugin was tested with."""

import importlib.metadata

from packaging.specifiers import SpecifierSet

__all__ = ["TESTED_LEROBOT", "refuse_untested_lerobot"]

TESTED_LEROBOT = ">=0.6.1,<0.7"  # as pyproject.toml asks for


def refuse_untested_lerobot() -> None:
    """Raises an `ImportError` for an untested LeRobot, whose interfaces change between versions."""
    installed = importlib.metadata.version("lerobot")
    if not SpecifierSet(TESTED_LEROBOT).contains(installed, prereleases=True):
        raise ImportError(
            f"The policy 'foresight' was tested with lerobot{TESTED_LEROBOT}, but {installed} is installed: "
            f"pip install 'lerobot{TESTED_LEROBOT}', or a lerobot_policy_foresight for {installed}."
        )
