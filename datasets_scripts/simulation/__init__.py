"""Simulators, recording an episode in one, and exact tracks."""
