# Copyright 2026 The 3D Foresight authors. Licensed under the Apache License, Version 2.0.
"""LeRobot's view of 3D Foresight: LeRobot imports this package from the distribution of the same name.

Importing it registers the policy `foresight` and the environment `foresight_metaworld`. The policy itself and
the simulator are imported when LeRobot makes one.
"""

import datasets_scripts  # noqa: F401 - refuses an installation of the model alone

from .lerobot_version import refuse_untested_lerobot

try:
    from .configuration_foresight import LeRobotForesightConfig
    from .metaworld_env import ForesightMetaWorldConfig
    from .processor_foresight import make_foresight_pre_post_processors
except ImportError:
    refuse_untested_lerobot()  # the reason, if what is missing was moved by another version
    raise

__all__ = ["LeRobotForesightConfig", "ForesightMetaWorldConfig", "make_foresight_pre_post_processors"]
