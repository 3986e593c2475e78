"""LeRobot datasets as windows of T frames with targets and masks; mixtures and samplers."""
