"""Synthetic images with questions, answers and boxes, each drawn from a seed."""
