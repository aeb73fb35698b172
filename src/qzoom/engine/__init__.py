"""The flow of one question: coarse pass, gate, region, zoomed pass, answer."""
