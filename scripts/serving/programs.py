"""Programs that the checks run, and files that pip fetches for them."""

from __future__ import annotations

import hashlib
import pathlib
import subprocess
import sys
from collections.abc import Sequence


class CheckError(Exception):
    """A check cannot run, or fails."""


def run(command: Sequence[str], text: str | None = None) -> str:
    """Returns the output of a command.

    Args:
      command: its words.
      text: its input.

    Raises:
      CheckError: it fails; with the last line of its errors.
    """
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or 'no message').splitlines()[-1]
        raise CheckError(f'{" ".join(command[:4])} failed: {last}')
    return result.stdout


def sha256_of(file: pathlib.Path) -> str:
    """Returns the SHA-256 of a file."""
    with file.open('rb') as stream:
        return hashlib.file_digest(stream, 'sha256').hexdigest()


def require(file: pathlib.Path, sha256: str) -> None:
    """Raises CheckError if a file has another SHA-256."""
    if sha256_of(file) != sha256:
        raise CheckError(f'{file.name} has another SHA-256 than {sha256}: it is not used.')


def download(package: str, version: str, sha256: str, folder: str, *options: str) -> pathlib.Path:
    """Fetches the file of a package by pip, without its dependencies.

    Args:
      package, version: on the package index.
      sha256: of the file.
      folder: an empty folder.
      options: of pip.

    Raises:
      CheckError: pip fails, or fetches another file.
    """
    print(f'fetching {package} {version} ...', file=sys.stderr, flush=True)
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', *options, f'--dest={folder}']
    run([*command, f'{package}=={version}'])
    (file,) = pathlib.Path(folder).iterdir()
    require(file, sha256)
    return file
