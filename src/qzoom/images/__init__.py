"""Pictures in: any source to safe 8-bit RGB, and the pure arithmetic of boxes and visual-token grids."""
