"""The training stages: what trains, on what, with which loss, and the one loop that they share."""
