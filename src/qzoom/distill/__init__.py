"""Region-to-Image distillation: answers that teachers give about crops become questions about whole pictures."""
