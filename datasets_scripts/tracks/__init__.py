"""Sources of 3D tracks, one small file each behind `track(video, depth, queries)`."""
