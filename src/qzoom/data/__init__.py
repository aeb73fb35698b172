"""Samples and question files, benchmarks, synthetic images, overlays and crops."""
