"""Figures of answers: question, heat map, regions, answer, tokens and times."""
