"""Other projects' archives as LeRobot v3 datasets."""
