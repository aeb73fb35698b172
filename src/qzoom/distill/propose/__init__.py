"""Where to look: proposers name boxes, `select` keeps those worth asking about."""
