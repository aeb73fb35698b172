"""Training labels from the model itself: region maps (stage 1), hard cases (stage 2), gate targets (stage 3)."""
