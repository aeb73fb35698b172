"""Training on distilled data: answers that were found on crops are learned from the whole picture."""
