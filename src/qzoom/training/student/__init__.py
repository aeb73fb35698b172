"""The student of a distilled data set: supervised training and GRPO, on trl."""
