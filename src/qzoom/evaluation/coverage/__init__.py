"""Attention coverage: how much of what a question adds to the attention falls on the answer's place."""
