"""Measurements that take hours: the ablation and MT50, in cells that are made once and can be interrupted."""
