"""One file a task: where its pictures come from, what is asked about them, and what the right answers are."""
