"""Where a chain begins."""

import numpy as np


def get_env_state_for_initial_condition(initial_condition):
    robot_obs = np.zeros(15)
    robot_obs[:6] = [0.0259, -0.2313, 0.5713, 3.0905, -0.0291, 1.5001]
    robot_obs[14] = 1
    scene_obs = np.zeros(24)
    scene_obs[0] = 0.28 * (initial_condition["slider"] == "left")
    scene_obs[5] = initial_condition["led"]
    return robot_obs, scene_obs
