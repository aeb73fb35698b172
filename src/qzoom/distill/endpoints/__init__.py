"""OpenAI-compatible endpoints: calls that are paid once, kept by content, and counted."""
