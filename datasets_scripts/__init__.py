"""Makes, annotates and checks datasets: LeRobot v3 demonstrations with depth and 3D tracks."""

from .extras import require_train

require_train()
