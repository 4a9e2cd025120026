"""Odd output paths, and a check that existing files are kept."""

import contextlib
import os
import pathlib
import random
import shutil
from collections.abc import Iterator

from fuzzing.case import LostError


class Places:
    """A tree with one path of each kind; it is rebuilt after a case has changed it.

    Args:
      folder: folder of the tree.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._make()

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """Draws a kind of path, and the path."""
        base = str(self._folder)
        places = {
            'a file': f'{base}/file',
            'below a file': f'{base}/file/x',
            'deep below a file': f'{base}/file/x/y/z',
            'a folder with something in it': f'{base}/full',
            'an empty folder': f'{base}/empty',
            'below an empty folder': f'{base}/empty/x',
            'a dangling link': f'{base}/dangling',
            'below a dangling link': f'{base}/dangling/x',
            'a loop of links': f'{base}/loop',
            'below a loop of links': f'{base}/loop/x',
            'a link to a folder': f'{base}/link',
            'below a link to a folder': f'{base}/link/x',
            'a link to a file': f'{base}/link_to_file',
            'a run': f'{base}/run',
            'below a run': f'{base}/run/x',
            'the checkpoints of a run': f'{base}/run/checkpoints',
            'a step of a run': f'{base}/run/checkpoints/9',
            'a fifo': f'{base}/fifo',
            'below a fifo': f'{base}/fifo/x',
            'a device': '/dev/null',
            'below a device': '/dev/null/x',
            'a full device': '/dev/full',
            'proc': '/proc/x',
            'below proc': '/proc/self/x',
            'sys': '/sys/x',
            'the root': '/',
            'nothing': '',
            'here': '.',
            'a name that is too long': f'{base}/{"n" * 300}',
            'a path that is too long': f'{base}/' + 'n/' * 2100 + 'x',
            'a name that is just not too long': f'{base}/empty/{"n" * 250}',
            'a line break': f'{base}/empty/a\nb',
            'a space': f'{base}/empty/ ',
            'a star': f'{base}/empty/*',
            'a snowman': f'{base}/empty/\u2603',
            'not UTF-8': f'{base}/empty/\udcff',
            'a trailing slash': f'{base}/empty/x/',
            'dots': f'{base}/empty/../empty/x',
            'dots over what is not there': f'{base}/nowhere/../x',
            'a user who is not there': '~nobody_of_this_name/x',
            'an address of another kind': 'http://host/x',
            'an address without a bucket': 'gs://',
            'an address of a file': f'file://{base}/empty/x',
            'an unfinished write': f'{base}/unfinished',
        }
        kind = rng.choice(sorted(places))
        return kind, places[kind]

    @contextlib.contextmanager
    def unchanged(self, may_write: str) -> Iterator[None]:
        """Raises LostError if an existing file is missing or changed on exit; then rebuilds the tree if needed.

        Args:
          may_write: the path at which new files are allowed.
        """
        before = self._contents()
        try:
            yield
            after = self._contents()
            lost = [name for name, content in before.items() if after.get(name) != content]
            if lost:
                raise LostError(f'the command has removed or changed {lost[:3]}')
            new = [name for name in after.keys() - before.keys() if not self._is_at(name, may_write)]
            if new:
                raise LostError(f'the command has written {sorted(new)[:3]}, outside its output path')
        finally:
            if self._contents() != before:
                self._make()

    def _is_at(self, name: str, place: str) -> bool:
        here, there = os.path.realpath(self._folder / name), os.path.realpath(place)
        # A file that is being written is next to its final path, with a longer name.
        return here.startswith(there) or there.startswith(here + os.sep)

    def _contents(self) -> dict[str, bytes | str]:
        found: dict[str, bytes | str] = {}
        for folder, folders, names in os.walk(self._folder):
            for name in (*folders, *names):
                path = pathlib.Path(folder, name)
                relative = os.path.relpath(path, self._folder)
                if path.is_symlink():
                    found[relative] = f'-> {os.readlink(path)}'
                elif path.is_file():
                    found[relative] = path.read_bytes()
                else:
                    found[relative] = 'folder' if path.is_dir() else 'special'
        return found

    def _make(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ('full', 'empty', 'target', 'run/checkpoints/4/state', 'unfinished.orbax-checkpoint-tmp'):
            (self._folder / name).mkdir(parents=True)
        for name in ('file', 'full/precious.txt', 'run/config.gin', 'run/checkpoints/4/state/_METADATA'):
            (self._folder / name).write_text('precious')
        (self._folder / 'run' / 'metrics.jsonl').write_text('{"step": 4, "split": "train", "loss": 1.0}\n')
        (self._folder / 'dangling').symlink_to('/nonexistent/disk')
        (self._folder / 'loop').symlink_to('loop')
        (self._folder / 'link').symlink_to('target')
        (self._folder / 'link_to_file').symlink_to('file')
        os.mkfifo(self._folder / 'fifo')
