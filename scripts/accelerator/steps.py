"""Training steps of three models at full size: the trainer's own step on random weights and random data."""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from accelerator.device import Device, LeftOutError
from upcycle import configuration, cost, partitioning
from upcycle.training import loop
from upcycle.training import state as states
from upcycle.training.run import ModelRun
from upcycle.training.start import check_batches

SECONDS, STEPS = 3.0, 20  # a row is timed until either is reached


@dataclasses.dataclass(frozen=True)
class Family:
    """A model and its sizes.

    Attributes:
      size, toy: names of files in gin/models/.
      recipe, task: names of files in gin/moe/ and gin/tasks/.
      experts: to try, until the state fits.
      layers: the same; (None,) for those of `size`.
      most: examples in a batch.
      example_bytes: of activations of an example, estimated upwards.
      bindings, sparse_bindings, toy_bindings: of gin.
    """

    size: str
    toy: str
    recipe: str
    task: str
    experts: tuple[int, ...]
    layers: tuple[int | None, ...]
    most: int
    example_bytes: float
    bindings: Mapping[str, Any]
    sparse_bindings: Mapping[str, Any]
    toy_bindings: Mapping[str, Any]


FAMILIES = {
    't5': Family(
        size='t5_1_1_base',
        toy='t5_1_1_tiny',
        recipe='t5',
        task='synthetic_text',
        experts=(32, 16, 8, 4),
        layers=(None,),
        most=64,
        example_bytes=0.5e9,
        bindings={'SCAN_LAYERS': True},
        sparse_bindings={},
        toy_bindings={'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 8}, 'NUM_EMBEDDINGS': 128},
    ),
    'vit': Family(
        size='vit_b16',
        toy='vit_mini',
        recipe='vit',
        task='synthetic_images',
        experts=(32, 16, 8, 4),
        layers=(None,),
        most=128,
        example_bytes=0.1e9,
        bindings={'SCAN_LAYERS': True},
        sparse_bindings={},
        toy_bindings={'IMAGE_SIZE': 16, 'NUM_CLASSES': 10, 'NUM_LAYERS': 2},
    ),
    'llm': Family(
        size='llama3_2_1b',
        toy='llm_tiny',
        recipe='llm',
        task='synthetic_tokens',
        experts=(8, 4),
        layers=(16, 8, 4, 2, 1),
        most=16,
        example_bytes=2.5e9,
        bindings={'SCAN_LAYERS': True, 'REMAT': 'full', 'SEQUENCE_LENGTH': 1024},
        # Masks of `einsum` grow with the square of a group.
        sparse_bindings={'GROUP_SIZE': 2048},
        toy_bindings={'SEQUENCE_LENGTH': 16},
    ),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What of a family fits the device: its experts, its layers (None: all), and the examples of a batch."""

    experts: int
    layers: int | None
    batch: int


class Steps:
    """The rows of a family. The sparse state is kept from row to row, because dispatch does not change it."""

    def __init__(self, family: str, device: Device):
        self._family, self._device = FAMILIES[family], device
        self._sizes: Sizes | None = None
        self._kept: tuple[Any, Any] | None = None

    def row(self, variant: str) -> dict[str, Any]:
        """Runs one row: 'dense', a dispatch, or 'expert parallel'.

        Raises:
          LeftOutError: there is one device.
        """
        devices = jax.local_devices()[:1]
        if variant == 'expert parallel':
            devices = jax.local_devices()[: math.gcd(self._device.count, self.sizes.experts)]
            if len(devices) == 1:
                raise LeftOutError('there is one device, or a number of them that does not divide the experts.')
        run = self._run(self.sizes, variant, len(devices))
        mesh = partitioning.make_mesh((1, len(devices), 1), run.num_experts, devices)
        with partitioning.use(mesh):
            return self._measure(run, mesh)

    @property
    def sizes(self) -> Sizes:
        """The largest sizes that fit, of the sparse model; dense rows have the same batch."""
        self._sizes = self._sizes or self._choose()
        return self._sizes

    def _choose(self) -> Sizes:
        family = self._family
        if self._device.memory is None:
            return Sizes(experts=4, layers=None, batch=8)
        mesh = partitioning.make_mesh((1, 1, 1), None, jax.local_devices()[:1])
        for layers in family.layers:
            for experts in family.experts:
                run = self._run(Sizes(experts, layers, 1), 'gather', 1)
                state = states.make_layout(run, mesh).abstract
                # Gradients, and a copy of the parameters in the activations' type.
                held = cost.num_bytes(state) + 1.5 * cost.num_bytes(state.params)
                examples = int((0.9 * self._device.memory - held) / family.example_bytes)
                if examples >= 1:
                    batch = min(1 << (examples.bit_length() - 1), family.most)
                    return Sizes(experts, layers, batch)
        raise LeftOutError(f'{self._device.memory / 1e9:.0f} GB do not hold the smallest sparse model.')

    def _run(self, sizes: Sizes, variant: str, devices: int) -> ModelRun:
        """Builds a run from gin files."""
        family, toy = self._family, self._device.toy
        bindings = {**family.bindings, **(family.toy_bindings if toy else {}), 'TRAIN_STEPS': 1000}
        bindings['BATCH_SIZE'] = sizes.batch * devices
        if sizes.layers is not None:
            bindings['NUM_LAYERS'] = sizes.layers
        files = [f'models/{family.toy if toy else family.size}.gin', f'tasks/{family.task}.gin', 'runs/scratch.gin']
        if variant != 'dense':
            files.insert(1, f'moe/{family.recipe}.gin')
            bindings |= {**family.sparse_bindings, 'NUM_EXPERTS': sizes.experts, 'GROUPS_MULTIPLE_OF': devices}
            if variant != 'expert parallel':
                bindings['DISPATCH'] = variant
        return configuration.load_model(files, {name: repr(value) for name, value in bindings.items()})

    def _measure(self, run: ModelRun, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        check_batches(run, mesh)
        sharding = partitioning.batch_sharding(mesh)
        layout = states.make_layout(run, mesh)
        begin = time.monotonic()
        compiled = loop.lower_step(run, layout, sharding).compile()
        compile_seconds = time.monotonic() - begin
        state = self._state(run, layout)
        batch = next(partitioning.batches(run.train_data, 0, sharding))
        seconds, metrics, state = _timed(compiled, state, batch)
        if metrics['skipped'] or not np.isfinite(metrics['loss']):
            raise ArithmeticError(f'the loss is {metrics["loss"]} and the step was skipped.')
        self._kept = layout.shardings, state
        spec = run.train_data.batch_spec()
        flops = cost.step_flops(run.model, spec)
        memory = compiled.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = self._device.peak
        return {
            'sizes': ', '.join(self._described(run)),
            'time': seconds,
            'rate': run.model.num_units(spec) / seconds / mesh.size,
            'unit': f'{run.model.unit}s',
            'mfu': flops / seconds / mesh.size / peak if peak else None,
            'memory_gb': (held + memory.temp_size_in_bytes) / 1e9,
            'tflop': flops / mesh.size / 1e12,
            'loss': float(metrics['loss']),
            'compile_seconds': compile_seconds,
        }

    def _state(self, run: ModelRun, layout: states.Layout) -> Any:
        kept, self._kept = self._kept, None
        if kept is not None and kept[0] == layout.shardings:
            return kept[1]
        del kept
        return states.initializer(run, layout)(jax.random.key(run.seed))

    def _described(self, run: ModelRun) -> Iterator[str]:
        if run.num_experts:
            yield f'{run.num_experts} experts'
        if self.sizes.layers not in (None, self._family.layers[0]):
            yield f'{self.sizes.layers} of {self._family.layers[0]} layers'
        shapes = {shape for shape, _ in run.train_data.batch_spec().values() if len(shape) > 1}
        yield ' and '.join(sorted('x'.join(map(str, shape)) for shape in shapes))


def _timed(compiled: Any, state: Any, batch: Any) -> tuple[float, Mapping[str, Any], Any]:
    """Returns seconds of a step, the metrics of the last, and the state."""
    for _ in range(2):
        state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    begin = time.monotonic()
    for done in range(1, STEPS + 1):
        state, metrics = compiled(state, batch)
        if done % 5 == 0:
            jax.block_until_ready(metrics)
            if time.monotonic() - begin > SECONDS:
                break
    jax.block_until_ready(metrics)
    return (time.monotonic() - begin) / done, jax.device_get(metrics), state
