"""Metric writers: plug-ins that get the lines of a run's log, besides `metrics.jsonl`, which every run has."""

import importlib.util
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from etils import epath

from upcycle import files
from upcycle.errors import Unavailable, UserError, one_line
from upcycle.warning import warn

TENSORBOARD = ('tensorboard',)


class Place(NamedTuple):
    """Where a writer writes.

    Attributes:
      folder: local folder. A run in a bucket copies what is in it to the bucket.
      model_dir: the run's folder, local or in a bucket.
    """

    folder: pathlib.Path
    model_dir: epath.Path


class MetricWriter:
    """Base class of writers. Process 0 makes one when it starts or resumes.

    Attributes:
      library: module that it needs.
      install: what pip installs for it.
    """

    library: ClassVar[str]
    install: ClassVar[str]

    def __init__(self, place: Place):
        """Opens the writer.

        Raises:
          UserError: it cannot write there.
        """

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a line. A resumed run writes the steps after its checkpoint again."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes the rest and closes all files."""


class TensorBoard(MetricWriter):
    """Event files for TensorBoard, a folder for each split, each line on disk when `write` returns.

    By TensorBoard's own library; TensorFlow's writers would take seconds to import.
    """

    library, install = 'tensorboard', 'tensorboard'

    def __init__(self, place: Place):
        self._folder = place.folder
        self._files: dict[str, _EventFile] = {}

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """See `MetricWriter`."""
        if split not in self._files:
            self._files[split] = _EventFile(self._folder / split)
        self._files[split].write(step, scalars)

    def close(self) -> None:
        """See `MetricWriter`."""
        for file in self._files.values():
            file.close()


class WandB(MetricWriter):
    """A run of Weights & Biases, with the run's bindings as its configuration, which a resumed run continues.

    The library reads its settings from the environment: WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME. It writes to
    `MODEL_DIR/wandb`; of a run in a bucket to `WANDB_DIR`, or `./wandb`. The run's id is in `MODEL_DIR/wandb_id.txt`. Steps are
    the metric `step`, since the library drops lines that go back in its own steps.
    """

    library, install = 'wandb', 'upcycle[wandb]'

    def __init__(self, place: Place):
        import wandb

        # Imported here, since it imports the run, which imports this module.
        from upcycle.run_config import CONFIG, stored

        is_local = not files.is_remote(place.model_dir)
        try:
            self._run = wandb.init(
                dir=str(place.folder) if is_local else None,
                id=_id_of(place.model_dir),
                name=os.environ.get('WANDB_NAME') or place.model_dir.name,
                config=stored(place.model_dir / CONFIG),
                resume='allow',
            )
        except wandb.errors.CommError as error:
            raise Unavailable(f'METRIC_WRITERS: Weights & Biases does not answer ({one_line(error)}).') from error
        except wandb.errors.Error as error:
            raise UserError(
                f'METRIC_WRITERS: wandb cannot start ({one_line(error)}): correct it, or set WANDB_MODE=offline.'
            ) from error
        self._run.define_metric('*', step_metric='step')
        self._lost = False

    def write(self, step: int, split: str, scalars: Mapping[str, float]) -> None:
        """See `MetricWriter`. Names are `SPLIT/METRIC`."""
        self._ask(self._run.log, {'step': step} | {f'{split}/{name}': value for name, value in scalars.items()})

    def close(self) -> None:
        """See `MetricWriter`. Waits until everything is sent, unless the run is offline."""
        self._ask(self._run.finish)

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Calls the library, until it fails, as when its process was killed: the run continues without it."""
        if self._lost:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._lost = True
            warn(f'Weights & Biases gets no more lines ({one_line(error)}); metrics.jsonl has them all.')


# By their names in METRIC_WRITERS. A module that a gin file imports may add its own.
WRITERS: dict[str, type[MetricWriter]] = {'tensorboard': TensorBoard, 'wandb': WandB}


def unknown(names: Sequence[str]) -> list[str]:
    """Returns a sentence for each name of METRIC_WRITERS that is no writer's."""
    return [
        f'METRIC_WRITERS names {name!r}, which is unknown: choose from {", ".join(WRITERS)}.'
        for name in names
        if name not in WRITERS
    ]


def require(names: Sequence[str]) -> None:
    """Raises UserError if the library of a writer is not installed."""
    for name in names:
        writer = WRITERS[name]
        found = importlib.util.find_spec(writer.library)
        if found is None or found.origin is None:  # a folder of that name is not the library
            raise UserError(
                f'METRIC_WRITERS names {name!r}, and {writer.library} is not installed: pip install {writer.install}, or remove '
                'it.'
            )


class _EventFile:
    """An event file.

    Args:
      folder: folder of the new file.
    """

    def __init__(self, folder: pathlib.Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard's pattern of names; unique to this writer.
        name = f'events.out.tfevents.{now:.6f}.{socket.gethostname()}.{os.getpid()}'
        self._records = RecordWriter(open(folder / name, 'wb'))  # noqa: SIM115  open as long as the run
        self._write(self._event(wall_time=now, file_version='brain.Event:2'))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one event with all scalars of a step."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def _id_of(model_dir: epath.Path) -> str:
    """Returns the id of a run's Weights & Biases run, drawn when it begins."""
    file = model_dir / 'wandb_id.txt'
    if not file.exists():
        files.replace_text(file, os.environ.get('WANDB_RUN_ID') or secrets.token_hex(4))
    return file.read_text().strip()
