"""What a policy depends on: changed inputs in closed loop, errors by task, calibration, causality."""
