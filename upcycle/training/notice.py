"""Preemption notices of cloud platforms, turned into the SIGTERM that the trainer listens for.

Clouds send SIGTERM when they shut a machine down. Their metadata servers may announce it earlier, and to processes that do not
get the signal.
"""

import contextlib
import http.client
import os
import signal
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping

from upcycle.errors import UserError

PERIOD = 5.0  # seconds between two requests, as AWS advises
TIMEOUT = 5.0  # seconds for an answer
# No proxy: these addresses are local to the machine.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def _ask(url: str, headers: Mapping[str, str], method: str = 'GET') -> str | None:
    """Returns the answer, or None for status 404.

    Raises:
      OSError: no answer.
    """
    try:
        with _open(urllib.request.Request(url, headers=dict(headers), method=method), timeout=TIMEOUT) as answer:
            return answer.read().decode(errors='replace').strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    except (http.client.HTTPException, ValueError) as error:
        # A malformed HTTP response, or an invalid URL in the environment.
        raise OSError(f'{url}: {error or type(error).__name__}') from error


def _gce() -> bool:
    """Google Compute Engine and Cloud TPU: `instance/preempted` becomes TRUE 30 s before the machine stops."""
    host = os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')
    url = f'http://{host}/computeMetadata/v1/instance/preempted'
    return _ask(url, {'Metadata-Flavor': 'Google'}) == 'TRUE'


def _aws() -> bool:
    """EC2: `spot/instance-action` appears two minutes before the machine stops."""
    server = os.environ.get('AWS_EC2_METADATA_SERVICE_ENDPOINT', 'http://169.254.169.254').rstrip('/')
    token = _ask(f'{server}/latest/api/token', {'X-aws-ec2-metadata-token-ttl-seconds': '300'}, 'PUT')
    if token is None:
        raise OSError('no session token')
    return _ask(f'{server}/latest/meta-data/spot/instance-action', {'X-aws-ec2-metadata-token': token}) is not None


NOTICES: dict[str, Callable[[], bool]] = {'gce': _gce, 'aws': _aws}


@contextlib.contextmanager
def listen(platform: str | None) -> Iterator[None]:
    """Sends this process SIGTERM, once, when the platform announces that it preempts the machine.

    Args:
      platform: one of `NOTICES`; None: no requests are made.

    Raises:
      UserError: the platform is unknown, or its metadata server does not answer.
    """
    if platform is None:
        yield
        return
    if platform not in NOTICES:
        raise UserError(f'--preemption_notice={platform} is not one of {", ".join(NOTICES)}.')
    is_given = NOTICES[platform]
    try:
        is_given()
    except OSError as error:
        raise UserError(
            f'--preemption_notice={platform}: the metadata server of this platform does not answer ({error}): remove the option '
            'on other machines; SIGTERM works without it.'
        ) from error
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            # No answer is not a notice.
            with contextlib.suppress(OSError):
                if is_given():
                    print(f'{platform} preempts this machine', file=sys.stderr, flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
            over.wait(PERIOD)

    watcher = threading.Thread(target=watch, name='preemption notice', daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(2 * TIMEOUT)
