"""`python -m upcycle`, and the console script."""

import signal

# First of all: until `main` listens, SIGINT just ends the process, without a traceback. Not where it is ignored.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from upcycle.cli import main  # noqa: E402

if __name__ == '__main__':
    main()
