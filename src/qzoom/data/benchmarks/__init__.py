"""The tasks of `qzoom eval`: where their images come from, the questions, and the right answers."""
