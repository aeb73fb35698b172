"""The HTTP server: OpenAI's protocol in front of one model that many requests share."""
