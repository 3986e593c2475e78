"""The annotation job: settings, one episode, shards, workers, merging, dry run."""
