"""Figures of answers: what was asked, where it looked, what it read, and what that cost."""
