"""`python -m qzoom`: the same as the `qzoom` command."""

from qzoom.cli.main import main

if __name__ == "__main__":
    main()
