"""Model cards, filled in from what a run measured."""
