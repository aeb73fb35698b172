"""The flow of one question: coarse look, gate, region, fused read, answer."""
