"""Finetuning of the goal generator."""
