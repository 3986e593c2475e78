"""LeRobot's view of 3D Foresight.

LeRobot imports the package of this name from every installed distribution called `lerobot_policy_*`; importing it
registers the model with the Auto classes of `transformers`.
"""

import modeling_foresight  # noqa: F401
