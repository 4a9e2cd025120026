"""Converts errors of bucket clients to messages for the user."""

import re
from collections.abc import Iterator, Sequence

from upcycle.errors import Unavailable, UserError, without_password

# Modules that define the errors of bucket clients: TensorFlow's, fsspec's with gcsfs or s3fs, and TensorStore. Clients raise them
# after their own retries.
_CLIENTS = (
    *('tensorflow.', 'gcsfs.', 's3fs.', 'fsspec.', 'aiohttp.', 'aiobotocore.', 'botocore.'),
    *('google.', 'requests.', 'urllib3.'),
)
# Messages if there is no answer. Status words are gRPC's, used by TensorFlow and TensorStore.
_SILENCE = re.compile(
    r'libcurl code|\bUNAVAILABLE\b|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|\bABORTED\b|resolve|timed? ?out|Cannot connect|'
    r'Could not connect|Connection (?:reset|refused|aborted)|Max retries|HTTP (?:response )?(?:code )?(?:429|5\d\d)\b|'
    r'Name or service not known|Temporary failure|unreachable',
    re.IGNORECASE,
)
_SILENT = (
    *('Unavailable', 'DeadlineExceeded', 'ResourceExhausted', 'Aborted'),
    *('Timeout', 'Connect', 'Transport', 'gaierror'),
)
_ADDRESS = re.compile(r'(?:gs|s3)://[^\s\'",;)\]]*')


def refused_by_bucket(error: BaseException, arguments: Sequence[str] = ()) -> UserError | None:
    """Converts an error of a bucket client.

    Args:
      error: any error that ended a command.
      arguments: of the command; they may contain addresses.

    Returns:
      `Unavailable` if the bucket did not answer, another `UserError` if it refused, None if the error is unrelated to a bucket.
    """
    asked = [address for argument in arguments for address in _ADDRESS.findall(argument)]
    for cause in _causes(error):
        text = ' '.join(str(cause).split())
        named = _ADDRESS.findall(text)
        by_client = type(cause).__module__.startswith(_CLIENTS)
        if (by_client and (asked or named)) or (asked and _python_error_of_a_client(cause, text)):
            return _refusal(cause, text, without_password((named or asked)[0]))
    return None


def _python_error_of_a_client(error: BaseException, text: str) -> bool:
    """Whether a built-in error was raised by a bucket client."""
    if not isinstance(error, OSError | ImportError | ValueError | KeyError):
        return False
    return (
        _ADDRESS.search(text) is not None
        or 'bucket' in text.lower()
        or text.startswith(('http://', 'https://'))  # gcsfs, where the bucket does not exist
        or type(error).__name__ in ('gaierror', 'TimeoutError', 'PermissionError')
        or (isinstance(error, ImportError) and re.search('gcsfs|s3fs', text) is not None)
    )


def _refusal(error: BaseException, text: str, address: str) -> UserError:
    """Returns the message for an error of a client.

    Args:
      error: of the client.
      text: its message, on one line.
      address: of the file or bucket.
    """
    reason = shortened(text) or type(error).__name__
    if _is_silence(error, text):
        return Unavailable(f'{address} does not answer ({reason}): check the network, and repeat the command.')
    client = 's3fs' if address.startswith('s3') else 'gcsfs'
    if 'not implemented' in text and 'scheme' in text:
        return UserError(
            f'{address} cannot be used: TensorFlow has no client for it: set EPATH_USE_TF=false, and pip install {client}.'
        )
    if isinstance(error, ImportError):
        return UserError(f'{address} cannot be used ({reason}): pip install {client}.')
    return UserError(
        f'{address} cannot be used ({reason}): check the address, that the bucket exists, and that the credentials of this '
        'machine may use it.'
    )


def _is_silence(error: BaseException, text: str) -> bool:
    """Whether there was no answer, or the answer was to retry later."""
    status = _http_status(error)
    if status:
        return status in (408, 429) or status >= 500
    return any(word in type(error).__name__ for word in _SILENT) or _SILENCE.search(text) is not None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, the errors of a group, and their causes."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        grouped = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
        waiting += [*grouped, error.__cause__, error.__context__]


def _http_status(error: BaseException) -> int:
    """Returns the HTTP status of an error; 0 if it has none."""
    response = getattr(error, 'response', None)
    metadata = response.get('ResponseMetadata', {}) if isinstance(response, dict) else {}
    for value in (metadata.get('HTTPStatusCode'), getattr(error, 'code', None), getattr(error, 'status', None)):
        if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) < 600:
            return int(value)
    return 0


def shortened(text: str, longest: int = 300) -> str:
    """Removes passwords and the final full stop from a message, and truncates it."""
    text = without_password(text).rstrip('. ')
    return text if len(text) <= longest else f'{text[:longest]}...'
