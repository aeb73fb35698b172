"""Tests of `qzoom.checkpoints`."""
