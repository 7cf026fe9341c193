"""`python -m lrt`, which is also what torchrun starts."""

from lrt.cli.main import main

if __name__ == "__main__":
    main()
