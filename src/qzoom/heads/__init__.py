"""Gate and region branches: from hidden states to a decision and to boxes."""
