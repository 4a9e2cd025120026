"""The start of a run: mesh, layout, checkpoint and plan, computed once before anything is allocated."""

import dataclasses
import functools

import jax

from upcycle import partitioning
from upcycle.checkpoints import Reader, open_checkpoints
from upcycle.moe.groups import check_groups, microbatch_groups
from upcycle.surgery.plan import Plan
from upcycle.training.run import ModelRun, Run
from upcycle.training.state import Layout, data_of, make_layout, make_plan


@dataclasses.dataclass(frozen=True)
class Start:
    """A run on its devices.

    Attributes:
      run: the run.
      mesh: its devices.
      layout: layout of its state.
    """

    run: Run
    mesh: jax.sharding.Mesh
    layout: Layout

    @classmethod
    def of(cls, run: Run) -> 'Start':
        """Computes mesh and layout.

        Raises:
          UserError: sizes do not divide among the devices.
        """
        mesh = partitioning.make_mesh(run.mesh_shape, run.num_experts)
        check_batches(run, mesh)
        return cls(run, mesh, make_layout(run, mesh))

    @functools.cached_property
    def reader(self) -> Reader:
        """The checkpoint that the run starts from, opened on first use.

        Raises:
          UserError: it cannot be read.
        """
        return open_checkpoints(self.run.initial_checkpoint_path)

    @functools.cached_property
    def plan(self) -> Plan:
        """The surgery on that checkpoint.

        Raises:
          UserError: it does not fit the run.
        """
        return make_plan(self.run, self.layout, self.reader)


def check_batches(run: ModelRun, mesh: jax.sharding.Mesh, *, training: bool = True) -> None:
    """Raises UserError unless the run's batches, and their routing groups, divide among the devices.

    Args:
      run: with its data.
      mesh: the devices.
      training: False: only batches of the evaluation data are used.
    """
    batches = [('BATCH_SIZE', data_of(run), run.num_microbatches)] if training else []
    if run.eval_data is not None:
        batches.append(('EVAL_BATCH_SIZE', run.eval_data, 1))
    layers = run.model.moe_layers()
    for binding, data, microbatches in batches:
        partitioning.check_batch(data.batch_size, mesh, microbatches, binding)
        for path, tokens in run.model.moe_tokens(data.batch_spec()).items():
            moe = dataclasses.replace(layers[path], num_microbatches=microbatches)
            if moe.routes:
                groups = microbatch_groups(moe, data.batch_size // microbatches, tokens // data.batch_size)
                if not moe.dropless:
                    check_groups(groups, partitioning.batch_shards(mesh))
