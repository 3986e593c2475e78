"""Engines that train one model with several processes: what was asked for, and weights in shards."""
