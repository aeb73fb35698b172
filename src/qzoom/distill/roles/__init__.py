"""Who asks, checks, answers, judges and is taught: by rule or behind an endpoint."""
