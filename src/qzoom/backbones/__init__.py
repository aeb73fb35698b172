"""Vision-language model families behind one protocol (`base.Backbone`)."""
