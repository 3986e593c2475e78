"""Predictions in real units, open-loop errors, closed-loop success, figures."""
