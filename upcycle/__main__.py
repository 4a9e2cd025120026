"""Entry point of `python -m upcycle` and of the console script."""

import signal

# Before all imports: until `main` handles SIGINT, it ends the process without a traceback, unless it is ignored.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from upcycle.cli import main  # noqa: E402

if __name__ == '__main__':
    main()
