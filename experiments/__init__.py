"""Measurements that take hours: ablation, robustness and MT50, in parts that are made once."""
