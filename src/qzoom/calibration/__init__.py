"""From a wanted operating point to thresholds: ask the user's questions, sweep what came out, choose, note why."""
