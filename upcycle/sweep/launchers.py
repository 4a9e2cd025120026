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
    """A command that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def stop(self) -> None:
        """Ends it, and waits until it has ended."""


class Launcher(Protocol):
    """Starts `upcycle` commands; `slots` of them may run at once."""

    slots: int

    def start(self, arguments: Sequence[str], log: str) -> Job:
        """Starts `upcycle ARGUMENTS`; its output is appended to the file `log`."""

    def start_all(self, commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[Job]:
        """Starts several, each as `start` does."""


class OneByOne:
    """A launcher that starts several commands one after the other."""

    def start_all(self, commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[Job]:
        """Starts several, each as `start` does."""
        for arguments, log in commands:
            yield self.start(arguments, log)


class LocalJob:
    """A process on this machine."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Terminates it, and waits."""
        if self._process.poll() is None:
            self._process.terminate()
        self._process.wait()


class Local(OneByOne):
    """This machine: one run after the other, or a few at once, each on its share of the cores.

    Args:
      environment: of the runs.
      keep_open: a file descriptor that the runs inherit, and with it the lock on it.
      slots: runs at once.
    """

    def __init__(self, environment: Mapping[str, str], keep_open: int, slots: int = 1):
        self._environment, self._keep_open, self.slots = dict(environment), keep_open, slots
        self._jobs: list[LocalJob | None] = [None] * slots

    def start(self, arguments: Sequence[str], log: str) -> LocalJob:
        """Starts `upcycle ARGUMENTS` in a new process."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        free = next(i for i, job in enumerate(self._jobs) if job is None or job.poll() is not None)
        with open(log, 'a', encoding='utf-8') as file, self._on_cores_of(free):
            job = LocalJob(
                subprocess.Popen(
                    [sys.executable, '-m', 'upcycle', *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    pass_fds=(self._keep_open,),
                )
            )
        self._jobs[free] = job
        return job

    @contextlib.contextmanager
    def _on_cores_of(self, slot: int) -> Iterator[None]:
        """Inside, processes are started on a slot's share of the cores, where the system has CPU affinity."""
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
    """A job of a cluster, by submitit.

    Args:
      job: submitit's.
      log: gets its output, when it has ended.
    """

    def __init__(self, job: Any, log: str):
        self._job, self._log, self._code = job, log, None

    def poll(self) -> int | None:
        """Its exit status, or None while it waits or runs."""
        if self._code is None and self._job.done():
            self._code = 0 if self._job.exception() is None else 1
            with open(self._log, 'a', encoding='utf-8') as file:
                file.write((self._job.stdout() or '') + (self._job.stderr() or ''))
                if self._code and not self._job.stdout():
                    file.write(f'{self._job.exception()}\n')
        return self._code

    def stop(self) -> None:
        """Takes it out of the queue, or ends it."""
        if self.poll() is None:
            self._job.cancel()


class Slurm:
    """A Slurm cluster that shares its files with this machine: each run is a job, of one process or many, and those that start
    together are an array.

    Args:
      environment: of the runs.
      keep_open: unused: a job does not hold the sweep's lock.
      slots: jobs that may wait or run at once.
      options: of submitit's executor, such as slurm_partition, timeout_min, gpus_per_node, nodes, tasks_per_node; and `cluster`,
        submitit's name of the kind of cluster.

    Raises:
      UserError: submitit is not installed, or refuses an option.
    """

    python = sys.executable

    def __init__(
        self,
        environment: Mapping[str, str],
        keep_open: int,
        slots: int = 1,
        options: Mapping[str, Any] | None = None,
    ):
        try:
            import submitit
        except ImportError:
            raise UserError('--where=slurm needs submitit: pip install upcycle[slurm].') from None
        self.slots, self._submitit, self._options = slots, submitit, dict(options or {})
        self._cluster = self._options.pop('cluster', 'slurm')
        processes = int(self._options.get('nodes', 1)) * int(self._options.get('tasks_per_node', 1))
        self._more = ['--distributed'] if processes > 1 else []
        # The sweep itself is told to leave accelerators alone; its jobs are not.
        platforms = environment.get('JAX_PLATFORMS')
        self._env = ['env', '-u', 'JAX_PLATFORMS'] if platforms is None else ['env', f'JAX_PLATFORMS={platforms}']

    def start(self, arguments: Sequence[str], log: str) -> SubmittedJob:
        """Submits `upcycle ARGUMENTS`."""
        return next(self.start_all([(arguments, log)]))

    def start_all(self, commands: Sequence[tuple[Sequence[str], str]]) -> Iterator[SubmittedJob]:
        """Submits several, as one array of jobs."""
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
        yield from (SubmittedJob(job, log) for job, log in zip(jobs, logs, strict=True))

    def _command(self, arguments: Sequence[str]) -> Any:
        command = ['bash', '-c', _AGAIN, 'again', *self._env, self.python, '-m', 'upcycle', *arguments, *self._more]
        return self._submitit.helpers.CommandFunction(command)


class GkeJob(LocalJob):
    """The xpk process that watches a workload; stopping it deletes the workload."""

    def __init__(self, process: subprocess.Popen, delete: Sequence[str]):
        super().__init__(process)
        self._delete = list(delete)

    def stop(self) -> None:
        """Ends the workload, and waits for xpk."""
        going = self.poll() is None
        super().stop()
        if going:
            subprocess.run(self._delete, check=False, stdout=subprocess.DEVNULL)


class Gke(OneByOne):
    """TPU slices of a Google Kubernetes Engine cluster, by xpk: each run is a workload.

    A workload outlives a sweep that is killed; the next one finds it by its name and watches it. One that failed is
    deleted, so that the sweep can try again.

    Args:
      environment: of xpk.
      keep_open: unused: a workload does not hold the sweep's lock.
      slots: workloads that may wait or run at once.
      options: of `xpk workload create`, without dashes: `cluster`, `tpu-type`, `docker-image`, and any other.

    Raises:
      UserError: xpk is not installed, or an option that it needs is missing.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        keep_open: int,
        slots: int = 1,
        options: Mapping[str, Any] | None = None,
    ):
        self.slots, self._environment, self._options = slots, dict(environment), dict(options or {})
        if shutil.which('xpk') is None:
            raise UserError('--where=gke needs xpk, and it is not on the PATH: pip install xpk.')
        for name in ('cluster', 'tpu-type', 'docker-image'):
            if name not in self._options:
                raise UserError(f'--where=gke needs --cluster {name}=..., an option of `xpk workload create`.')

    def start(self, arguments: Sequence[str], log: str) -> GkeJob:
        """Creates the workload `upcycle ARGUMENTS`, and watches it."""
        os.makedirs(os.path.dirname(log), exist_ok=True)
        # Names of workloads are short, and the same for the same run.
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
        # Creating fails where the workload exists already; it is watched all the same.
        script = f'{shlex.join(create)}\n{shlex.join(watch)} || {{ code=$?; {shlex.join(delete)}; exit $code; }}\n'
        with open(log, 'a', encoding='utf-8') as file:
            process = subprocess.Popen(
                ['bash', '-c', script],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        return GkeJob(process, delete)


# Arguments as those of Local; of clusters also their options.
LAUNCHERS: dict[str, Callable[..., Launcher]] = {'local': Local, 'slurm': Slurm, 'gke': Gke}


def make(name: str, environment: Mapping[str, str], keep_open: int, slots: int, options: Mapping[str, Any]) -> Launcher:
    """A launcher by name.

    Raises:
      UserError: it takes no options, and there are some.
    """
    if name == 'local' and options:
        raise UserError(f'--cluster {next(iter(options))}=... goes with --where=slurm or gke.')
    return LAUNCHERS[name](environment, keep_open, slots, **({'options': options} if options else {}))
