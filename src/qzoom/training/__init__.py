"""How the embedded model is made: its tokenizer, its weights from scratch, its data and its training loop."""
