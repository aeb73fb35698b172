"""Training labels made by the model itself: region maps (stage 1) and gate decisions (stage 3)."""
