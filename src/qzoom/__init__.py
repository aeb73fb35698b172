"""qzoom: look coarsely, decide, zoom, answer."""
