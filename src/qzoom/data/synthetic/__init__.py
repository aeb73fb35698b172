"""Pictures with questions, answers and boxes, drawn from a seed."""
