"""The zooming gap: the same questions asked of the whole picture, the region, the marked picture, and with zooming."""
