"""Sources of metric depth, one small file each, and how two of them are joined."""
