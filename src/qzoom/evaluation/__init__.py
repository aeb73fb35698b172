"""Evaluation: runner, scores, methods to compare with, zoom gap, attention coverage, calibration and report."""
