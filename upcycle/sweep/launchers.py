"""Where a sweep runs: a registry by the names that `--where` takes."""

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from upcycle.errors import PREEMPTED, UNAVAILABLE, UserError

# Repeats a command that ended because a peer did not answer, or because it was preempted and has saved.
_AGAIN = f"""pause=30
for try in {{1..10}}; do
  code=0
  "$@" || code=$?
  [[ $code -eq {UNAVAILABLE} || $code -eq {PREEMPTED} ]] || exit "$code"
  sleep "$pause"
  pause=$((pause < 600 ? 2 * pause : pause))
done
exit "$code"
"""


class Job(Protocol):
    """A started command."""

    def poll(self) -> int | None:
        """Returns the exit status, or None while the command waits or runs."""

    def stop(self) -> None:
        """Ends the command and waits until it has ended."""


class Launcher:
    """Starts `upcycle` commands.

    Attributes:
      slots: number of commands that may run at once.
    """

    slots: int

    def start(self, arguments: Sequence[str], log: str) -> Job:
        """Starts `upcycle ARGUMENTS` and appends its output to the file `log`."""
        raise NotImplementedError

    def start_all(self, commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[Job]:
        """Starts several (arguments, log) pairs, one after the other."""
        for arguments, log in commands:
            yield self.start(arguments, log)


class LocalJob(subprocess.Popen):
    """A process on this machine.

    Args:
      command: the program and its arguments.
      log: file to which the output is appended; its folder is made if absent.
      options: passed to `Popen`.
    """

    def __init__(self, command: Sequence[str], log: str, **options: Any):
        os.makedirs(os.path.dirname(log), exist_ok=True)
        with open(log, 'a', encoding='utf-8') as file:
            super().__init__(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, **options)

    def stop(self) -> None:
        """Terminates the process and waits for it."""
        self.terminate()
        self.wait()


class Local(Launcher):
    """Runs on this machine: one after the other, or several at once, each on its share of the cores.

    Args:
      environment: environment variables of the runs.
      keep_open: a file descriptor that the runs inherit, together with the lock on it.
      slots: number of runs at once.
    """

    def __init__(self, environment: Mapping[str, str], keep_open: int, slots: int = 1):
        self._environment, self._keep_open, self.slots = dict(environment), keep_open, slots
        self._jobs: list[LocalJob | None] = [None] * slots

    def start(self, arguments: Sequence[str], log: str) -> LocalJob:
        """Starts `upcycle ARGUMENTS` in a new process."""
        free = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        command = [sys.executable, '-m', 'upcycle', *arguments]
        with self._on_cores_of(free):
            job = LocalJob(command, log, env=self._environment, pass_fds=(self._keep_open,))
        self._jobs[free] = job
        return job

    @contextlib.contextmanager
    def _on_cores_of(self, slot: int) -> Iterator[None]:
        """Restricts new processes to the slot's share of the cores, where the system supports CPU affinity."""
        if self.slots == 1 or not hasattr(os, 'sched_setaffinity'):
            yield
            return
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[slot % len(cores) :: self.slots])
        try:
            yield
        finally:
            os.sched_setaffinity(0, cores)


class SubmittedJob:
    """A submitit job on a cluster.

    Args:
      job: the submitit job.
      log: file to which its output is appended when it has ended.
    """

    def __init__(self, job: Any, log: str):
        self._job, self._log, self._code = job, log, None

    def poll(self) -> int | None:
        """Returns the exit status, or None while the job waits or runs."""
        if self._code is None and self._job.done():
            self._code = 0 if self._job.exception() is None else 1
            with open(self._log, 'a', encoding='utf-8') as file:
                file.write((self._job.stdout() or '') + (self._job.stderr() or ''))
                if self._code and not self._job.stdout():
                    file.write(f'{self._job.exception()}\n')
        return self._code

    def stop(self) -> None:
        """Cancels the job, whether it waits or runs."""
        if self.poll() is None:
            self._job.cancel()


class Slurm(Launcher):
    """Runs as jobs of a Slurm cluster that shares its files with this machine.

    Each run is a job of one or several processes. Runs that start together are a job array.

    Args:
      environment: environment variables of the runs.
      keep_open: unused: a job does not hold the sweep's lock.
      slots: number of jobs that may wait or run at once.
      options: options of submitit's executor, such as slurm_partition, timeout_min, gpus_per_node, nodes, tasks_per_node; and
        `cluster`, submitit's name of the kind of cluster.

    Raises:
      UserError: submitit is not installed, or refuses an option.
    """

    python = sys.executable

    def __init__(
        self, environment: Mapping[str, str], keep_open: int, slots: int = 1, options: Mapping[str, Any] | None = None
    ):
        try:
            import submitit
        except ImportError:
            raise UserError('--where=slurm needs submitit: pip install upcycle[slurm].') from None
        self.slots, self._submitit, self._options = slots, submitit, dict(options or {})
        self._cluster = self._options.pop('cluster', 'slurm')
        processes = int(self._options.get('nodes', 1)) * int(self._options.get('tasks_per_node', 1))
        self._more = ['--distributed'] if processes > 1 else []
        # The sweep itself runs with JAX_PLATFORMS=cpu; its jobs must not inherit that.
        platforms = environment.get('JAX_PLATFORMS')
        self._env = ['env', '-u', 'JAX_PLATFORMS'] if platforms is None else ['env', f'JAX_PLATFORMS={platforms}']

    def start(self, arguments: Sequence[str], log: str) -> SubmittedJob:
        """Submits `upcycle ARGUMENTS` as a job."""
        return next(self.start_all([(arguments, log)]))

    def start_all(self, commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[SubmittedJob]:
        """Submits several commands as one job array."""
        logs = [log for _, log in commands]
        folder = os.path.join(os.path.commonpath([os.path.dirname(log) for log in logs]), 'submitit')
        os.makedirs(folder, exist_ok=True)
        try:
            executor = self._submitit.AutoExecutor(folder=folder, cluster=self._cluster)
            executor.update_parameters(name='upcycle', slurm_array_parallelism=self.slots, **self._options)
            with executor.batch():
                jobs = [executor.submit(self._command(arguments)) for arguments, _ in commands]
        except (
            RuntimeError,
            ValueError,
            TypeError,
            NameError,
            FileNotFoundError,
            subprocess.CalledProcessError,
        ) as error:
            raise UserError(f'--where=slurm, --cluster options: {str(error).splitlines()[0]}') from error
        yield from map(SubmittedJob, jobs, logs)

    def _command(self, arguments: Sequence[str]) -> Any:
        command = ['bash', '-c', _AGAIN, 'again', *self._env, self.python, '-m', 'upcycle', *arguments, *self._more]
        return self._submitit.helpers.CommandFunction(command)


class GkeJob(LocalJob):
    """The xpk process that watches a workload; stopping it deletes the workload.

    Args:
      command, log, options: as of `LocalJob`.
      delete: the command that deletes the workload.
    """

    def __init__(self, command: Sequence[str], log: str, delete: Sequence[str], **options: Any):
        super().__init__(command, log, **options)
        self._delete = delete

    def stop(self) -> None:
        """Stops watching, and deletes the workload if it was still running."""
        was_running = self.poll() is None
        super().stop()
        if was_running:
            subprocess.run(self._delete, check=False, stdout=subprocess.DEVNULL)


class Gke(Launcher):
    """Runs as xpk workloads on TPU slices of a Google Kubernetes Engine cluster.

    A workload outlives a sweep that is killed; the next sweep finds it by its name and watches it. A failed workload is
    deleted, so that the sweep can try again.

    Args:
      environment: environment variables of xpk.
      keep_open: unused: a workload does not hold the sweep's lock.
      slots: number of workloads that may wait or run at once.
      options: options of `xpk workload create`, without dashes: `cluster`, `tpu-type`, `docker-image`, and any other.

    Raises:
      UserError: xpk is not installed, or a required option is missing.
    """

    def __init__(
        self, environment: Mapping[str, str], keep_open: int, slots: int = 1, options: Mapping[str, Any] | None = None
    ):
        self.slots, self._environment, self._options = slots, dict(environment), dict(options or {})
        if shutil.which('xpk') is None:
            raise UserError('--where=gke needs xpk, and it is not on the PATH: pip install xpk.')
        for name in ('cluster', 'tpu-type', 'docker-image'):
            if name not in self._options:
                raise UserError(f'--where=gke needs --cluster {name}=..., an option of `xpk workload create`.')

    def start(self, arguments: Sequence[str], log: str) -> GkeJob:
        """Creates the workload `upcycle ARGUMENTS` and watches it."""
        # Workload names must be short, and the same run must get the same name.
        name = f'upcycle-{hashlib.sha256(shlex.join(arguments).encode()).hexdigest()[:16]}'
        cluster = [f'--{key}={self._options[key]}' for key in ('cluster', 'project', 'zone') if key in self._options]
        # As scripts/launch/gke.sh.
        options = {
            'num-slices': 1,
            'max-restarts': 100,
            'restart-on-exit-codes': f'{UNAVAILABLE},{PREEMPTED}',
            **self._options,
        }
        create = ['xpk', 'workload', 'create', f'--workload={name}']
        create += [f'--{key}={value}' for key, value in options.items()]
        create.append(f'--command=upcycle {shlex.join(arguments)} --distributed')
        watch = ['xpk', 'workload', 'list', *cluster, f'--wait-for-job-completion={name}']
        delete = ['xpk', 'workload', 'delete', *cluster, f'--workload={name}', '--force']
        # Creating fails if the workload exists already; it is watched all the same.
        script = f'{shlex.join(create)}\n{shlex.join(watch)} || {{ code=$?; {shlex.join(delete)}; exit $code; }}\n'
        return GkeJob(['bash', '-c', script], log, delete, env=self._environment)


# Every launcher takes the arguments of `Local`; those of clusters also take `options`.
LAUNCHERS: dict[str, Callable[..., Launcher]] = {'local': Local, 'slurm': Slurm, 'gke': Gke}


def make(name: str, environment: Mapping[str, str], keep_open: int, slots: int, options: Mapping[str, Any]) -> Launcher:
    """Makes a launcher by name.

    Raises:
      UserError: options are given for a launcher that takes none.
    """
    if name == 'local' and options:
        raise UserError(f'--cluster {next(iter(options))}=... goes with --where=slurm or gke.')
    return LAUNCHERS[name](environment, keep_open, slots, **({'options': options} if options else {}))
