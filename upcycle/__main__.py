"""`python -m upcycle` is the console script."""

from upcycle.cli import main

if __name__ == '__main__':
    main()
