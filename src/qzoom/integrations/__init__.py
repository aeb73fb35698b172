"""qzoom inside other people's programs; nothing here is imported unless they ask for it."""
