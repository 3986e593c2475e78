"""LeRobot v3 datasets on disk: read rows, frames and depth; write, append, copy; whole-or-nothing files."""
