"""What a run shows while it works: the log, its speed, pictures of its predictions, a rehearsal before it."""
