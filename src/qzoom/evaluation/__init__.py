"""How good it is: tasks with known answers, a runner that asks, and the figures; after the engine in the flow."""
