"""The annotation job: one episode, shards, workers, merging, dry run."""
