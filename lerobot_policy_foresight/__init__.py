"""LeRobot's view of 3D Foresight: LeRobot imports this package from the distribution of the same name."""
