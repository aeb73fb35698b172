"""The flow of one question: coarse pass, gate, region, fused read, answer."""
