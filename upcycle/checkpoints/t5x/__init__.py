"""T5X checkpoints in both layouts, dense and MoE (flaxformer's), read lazily and written part by part without T5X.

`legacy`: a msgpack file `checkpoint` whose leaves are small arrays, or TensorStore specs of zarr folders next to it
(`target.encoder.layers_0.mlp.wi_0.kernel/`). `orbax`: an Orbax item `state` with the same tree. Names are mapped as follows:
`target/<p>` to `params/<p>`, `state/param_states/<p>/v_row` to `opt_state/param_states/<p>/v_row`, and `state/step`, which is
also the decay clock of Adafactor, to `step` and `opt_state/count`.
Sources: t5x/checkpoints.py, adafactor.py, contrib/moe/adafactor_utils.py, examples/scalable_t5; flaxformer's
moe_architecture.py.
"""

from upcycle.checkpoints.t5x.legacy import LegacyLayout, LegacyReader
from upcycle.checkpoints.t5x.orbax import OrbaxLayout, OrbaxReader

__all__ = ['LegacyLayout', 'LegacyReader', 'OrbaxLayout', 'OrbaxReader']
