"""Our arithmetic against numbers recorded from the authors' own code: `python -m tests.parity DIR`."""
