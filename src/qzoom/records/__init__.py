"""What labelling and mining leave behind: typed records in JSON lines, their tensors in safetensors shards."""
