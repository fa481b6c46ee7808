"""`python -m hfslim` is the `hfslim` command."""

from hfslim.cli import main

if __name__ == "__main__":
    main()
