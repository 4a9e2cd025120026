"""Ahead-of-time compilation for a TPU topology, without a TPU: memory, FLOPs, collectives, and estimates of time and cost.

The figures are the TPU compiler's account of the program that a pod would run. Nothing is executed.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from upcycle import cost, partitioning
from upcycle.chips import CHIPS, Chip
from upcycle.errors import UserError
from upcycle.hlo import GRID, Collective, KernelCalls, Program
from upcycle.kernels import Kernels
from upcycle.progress import waiting
from upcycle.training import loop, start
from upcycle.training.run import ModelRun
from upcycle.training.state import make_layout

# Steps for the estimate of core-days if TRAIN_STEPS is not set; no other figure depends on it.
STEPS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Account:
    """Cost of one step on one device, by the compiler's account.

    Attributes:
      topology: such as 'v4:4x4x4'.
      devices: of the mesh.
      chips: of the topology.
      arguments, temporaries, code, peak: bytes, from XLA's statistics. For programs with loops `temporaries` has been up to 1.6
        times the memory that the compiler reserves.
      reserved: bytes reserved for arguments and temporaries together, which must fit a device's memory.
      xla_flops: XLA's count, in which the body of a loop counts once.
      matmul_flops: of all matrix products, loops multiplied, kernels included.
      analytic_flops: `cost.py`'s, per device.
      memory_bytes: read and written in memory: XLA's count (loops once) without kernels, and that of `kernels`.
      kernels: by name, loops multiplied, counted from their grids, since XLA does not count them.
      cycles: the compiler's estimate outside collectives, loops multiplied.
      collectives: by kind.
      compile_seconds: on this machine.
    """

    topology: str
    devices: int
    chips: int
    arguments: int
    temporaries: int
    code: int
    peak: int
    reserved: int
    xla_flops: float
    matmul_flops: float
    analytic_flops: float
    memory_bytes: float
    kernels: Mapping[str, KernelCalls]
    cycles: int
    collectives: Mapping[str, Collective]
    compile_seconds: float

    @property
    def chip(self) -> Chip:
        """The chip of the topology."""
        return CHIPS[self.topology.split(':')[0]]

    @property
    def usable(self) -> float:
        """Usable bytes of one device."""
        return self.chip.memory * self.chips / self.devices

    @property
    def has_loops(self) -> bool:
        """Whether XLA, which counts loops once, misses more than a tenth of the matrix products."""
        inside = sum(calls.flops for calls in self.kernels.values())
        return self.xla_flops < 0.9 * (self.matmul_flops - inside)

    @property
    def fits(self) -> bool:
        """Whether arguments, temporaries and code fit into a device's memory."""
        return self.reserved + self.code <= self.usable

    def seconds(self) -> dict[str, float]:
        """Returns a step's time by resource, each at its peak, and an estimate from these; nothing was run.

        Memory traffic inside loops counts once, so it is too small for scanned layers.
        """
        share = self.chips / self.devices
        wire = sum(collective.wire_bytes for collective in self.collectives.values())
        parts = {
            'matrix products at peak': self.matmul_flops / (self.chip.flops * share),
            'memory at full bandwidth': self.memory_bytes / (self.chip.memory_bandwidth * share),
            'network at full bandwidth': wire / (self.chip.network_bandwidth * share),
        }
        # Products and memory traffic overlap in a fused program; the synchronous collectives of an MoE layer do not.
        parts['estimate'] = (
            max(parts['matrix products at peak'], parts['memory at full bandwidth'])
            + parts['network at full bandwidth']
        )
        return parts

    def core_days(self, steps: int, utilization: float) -> float:
        """Returns the core-days of a run at a share (`utilization`) of the peak."""
        return cost.core_days(
            steps * self.analytic_flops * self.devices, self.chip.flops / self.chip.cores, utilization
        )


def compile_run(run: ModelRun, topology: str, *, num_slices: int = 1) -> tuple[Account, str]:
    """Compiles a run's training step for a topology.

    Args:
      run: its mesh shape must match the topology.
      topology: such as 'v4:4x4x8', 'v5e:16x16', 'v5p:4x4x8', 'v6e:16x16'.
      num_slices: number of slices, connected by the data-centre network.

    Returns:
      The account, and the compiled program as text.

    Raises:
      UserError: libtpu is not installed, the topology is unknown, or the program does not fit.
    """
    run = dataclasses.replace(run, total_steps=run.total_steps or STEPS)
    devices = _devices(topology, num_slices)
    mesh = partitioning.make_mesh(run.mesh_shape, run.num_experts, devices)
    start.check_batches(run, mesh)
    layout = make_layout(run, mesh)
    begin = time.monotonic()
    over_data = run.parameters_over_data
    with partitioning.use(mesh, over_data=over_data), waiting(f'compiling for {len(devices)} devices of {topology}'):
        traced = loop.trace_step(run, layout, partitioning.batch_sharding(mesh))
        lowered = traced.lower()
        try:
            with _dump() as (dump, options):
                compiled = lowered.compile(compiler_options=options)
                reserved = _reserved(dump)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            raise UserError(f'the step does not fit: {_shortage(str(error))} {ADVICE}') from None
    seconds = time.monotonic() - begin
    memory, counted = compiled.memory_analysis(), compiled.cost_analysis()
    text = compiled.as_text()
    program, cost_of = Program(text), Kernels(traced.jaxpr).cost
    kernels = program.kernels(cost_of)
    account = Account(
        topology=topology,
        devices=len(devices),
        chips=len({(getattr(device, 'slice_index', 0), *device.coords) for device in devices}),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        reserved=reserved or memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        xla_flops=counted['flops'],
        matmul_flops=program.matmul_flops(cost_of),
        analytic_flops=cost.step_flops(run.model, run.train_data.batch_spec()) / len(devices),
        memory_bytes=counted['bytes accessed']
        - program.estimated_bytes()
        + sum(calls.bytes for calls in kernels.values()),
        kernels=kernels,
        cycles=program.estimated_cycles(),
        collectives=program.collectives(),
        compile_seconds=seconds,
    )
    return account, text


ADVICE = (
    'Raise NUM_MICROBATCHES, recompute more (REMAT), loop over layers (SCAN_LAYERS), shard more (MESH_SHAPE, '
    'PARAMETERS_OVER_DATA), or use a larger topology.'
)


def show(account: Account, run: ModelRun, utilization: float) -> str:
    """Formats the account as text."""
    gb = 1e9
    lines = [
        f'{account.topology}: {account.devices} devices on {account.chips} chips; compiled in {account.compile_seconds:.0f} s',
        f'memory a device      arguments {account.arguments / gb:.3f} GB, temporaries {account.temporaries / gb:.3f} GB, '
        f'code {account.code / gb:.3f} GB, peak {account.peak / gb:.3f} GB; reserved {account.reserved / gb:.3f} GB '
        f'of {account.usable / gb:.1f} GB: ' + ('fits' if account.fits else f'DOES NOT FIT. {ADVICE}'),
        f'FLOPs a device, step {account.matmul_flops / 1e12:.3f} T in matrix products (loops multiplied), '
        f'{account.xla_flops / 1e12:.3f} T by XLA (loops once), {account.analytic_flops / 1e12:.3f} T by cost.py',
    ]
    if account.cycles:
        lines.append(
            f'cycles               {account.cycles / 1e6:.1f} M outside collectives, by the compiler (loops multiplied)'
        )
    for name, calls in sorted(account.kernels.items()):
        counted = '' if calls.counted == GRID else f'; by its own estimate, because {calls.counted}'
        lines.append(
            f'kernel               {name}: {calls.count} a step, {calls.flops / 1e12:.3f} TFLOP, {calls.bytes / gb:.3f} GB'
            f'{counted}'
        )
    for kind, total in sorted(account.collectives.items()):
        lines.append(
            f'{kind:20s} {total.count} a step, {total.operand_bytes / gb:.4f} GB in, {total.result_bytes / gb:.4f} GB out, '
            f'{total.wire_bytes / gb:.4f} GB on the wire'
        )
    if not account.collectives:
        lines.append('collectives          none')
    seconds = ', '.join(f'{name} {1e3 * value:.1f} ms' for name, value in account.seconds().items())
    loops = ' Memory traffic inside loops counts once, so that is too small.' if account.has_loops else ''
    lines.append(f'step, ESTIMATED      {seconds}; nothing was run.{loops}')
    steps = run.total_steps or STEPS
    lines.append(
        f'core-days, ESTIMATED {account.core_days(steps, utilization):.2f} for {steps} steps at '
        f'{utilization:.0%} of the peak'
    )
    return '\n'.join(lines)


def as_json(account: Account, run: ModelRun, utilization: float) -> dict[str, Any]:
    """Returns the account for JSON."""
    return {
        **dataclasses.asdict(account),
        'fits': account.fits,
        'estimated_seconds': account.seconds(),
        'estimated_core_days': account.core_days(run.total_steps or STEPS, utilization),
    }


def _devices(topology: str, num_slices: int) -> list[jax.Device]:
    kind = topology.split(':')[0]
    if kind not in CHIPS or ':' not in topology:
        raise UserError(
            f'--topology={topology} must be KIND:SHAPE with KIND one of {", ".join(CHIPS)}, such as v4:4x4x4.'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise UserError('compiling for TPUs needs libtpu: pip install "upcycle[tpu]".')
    options: dict[str, Any] = {'num_slices': num_slices} if num_slices > 1 else {}
    if kind == 'v4':
        # One device for each chip, as on a v4 pod.
        options['chip_config_name'] = 'megacore'
    try:
        with _quiet():
            description = topologies.get_topology_desc(platform='tpu', topology_name=topology, **options)
    except Exception as error:
        raise UserError(f'libtpu refuses --topology={topology}: {str(error).splitlines()[0]}') from None
    return list(description.devices)


@contextlib.contextmanager
def _dump() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the folder of the compiler's dump, that of XLA_FLAGS or a temporary one, and the options that enable the dump."""
    if flag := re.search(r'--xla_dump_to=(\S+)', os.environ.get('XLA_FLAGS', '')):
        yield Path(flag[1]), {}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), {'xla_dump_to': folder, 'xla_dump_hlo_as_text': True}


def _reserved(dump: Path) -> int | None:
    """Returns the bytes of device memory in the compiler's buffer assignment, from its dump; None if the dump lacks it."""
    # Only of the step: with XLA_FLAGS small programs on the CPU are dumped too.
    reports = [file.read_text(encoding='utf-8') for file in dump.glob('*train_step*memory-usage-report.txt')]
    matches = [re.search(r'Memory Space: default .*\nTotal bytes: (\d+)', report) for report in reports]
    return max((int(match[1]) for match in matches if match), default=None)


def _shortage(message: str) -> str:
    # The second form counts arguments, too.
    forms = r'Used ([\d.]+\w) of ([\d.]+\w) hbm', r'HLO temporaries \(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)'
    sizes = next(filter(None, (re.search(form, message) for form in forms)), None)
    return f'it needs {sizes[1]} of memory and a device has {sizes[2]}.' if sizes else message.splitlines()[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides standard error while libtpu starts, which prints pages."""
    saved = os.dup(2)
    with open(os.devnull, 'w', encoding='utf-8') as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
