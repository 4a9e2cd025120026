"""Compiles one dropless MoE layer of Llama-3.1-8B, forward and backward, for TPU v5p: each exchange, even and skewed loads.

  python scripts/bench/dropless.py                        # writes docs/benchmarks/dropless.csv
  python scripts/bench/dropless.py --only ring            # prints one exchange

D=4096, F=14336 (gated), 8 experts, Top-2, 4096 tokens a chip, bfloat16, parameters split over `data` too. Needs `upcycle[tpu]`.
Nothing is run. Products are counted by tiles, of a device's rows by what was drawn: an even load, and one in which the first
expert gets half of the choices.
"""

import argparse
import csv
import os
import pathlib
import sys
import time

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['TPU_SKIP_MDS_QUERY'] = '1'
os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from timing import table

from upcycle import partitioning
from upcycle.hlo import Program
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.exchanges import allowances
from upcycle.moe.layer import MoELayer
from upcycle.moe.megablox import gradient_tiles, product_tiles

CSV = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'benchmarks' / 'dropless.csv'
D, F, E, K, TOKENS = 4096, 14336, 8, 2, 4096
ROWS = TOKENS * K
# FLOPs of a row: three matrices, each once forward and twice backward.
ROW_FLOPS = 3 * 3 * 2 * D * F
SLICE, MESH = '2x2x4', (2, 8, 1)
CASES = ('ring', 'all_to_all', 'ragged_all_to_all')
FACTOR = 2.0
HEAD = [
    'exchange', 'load', 'dropped', 'rows of the busiest device', 'products over those of its rows',
    'TFLOP of the busiest device', 'temporary GB', 'GB on the wire', 'seconds to compile',
]  # fmt: skip


def compiled(exchange: str, mesh: jax.sharding.Mesh) -> tuple[float, float, float]:
    """Returns temporaries, what a device sends, and the seconds of the compiler."""
    config = MoEConfig(
        E, router='top_k', dispatch='ragged', normalize_combine_weights=True, groups_multiple_of=mesh.size,
        exchange=exchange, exchange_capacity_factor=FACTOR,
    )  # fmt: skip
    arguments = {'mlp_dim': F, 'activations': ('silu', 'linear'), 'dtype': jnp.bfloat16}
    layer = MoELayer(config, MlpBlock, arguments | {'embed_axis': 'mlp_embed', 'mlp_axis': 'expert_mlp'})
    shape = (mesh.size, TOKENS, D)

    def init():
        some = jnp.zeros((mesh.size, 8, D), jnp.bfloat16), jnp.ones((mesh.size, 8), bool)
        return layer.init(jax.random.key(0), *some, training=True)['params']

    def place(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    def loss(params, x):
        y = layer.apply({'params': params}, x, jnp.ones(shape[:2], bool), training=True)
        return jnp.square(y.astype(jnp.float32)).sum()

    begin = time.monotonic()
    with partitioning.use(mesh, over_data=True):
        boxed = jax.eval_shape(init)
        specs = partitioning.param_specs(boxed, mesh, over_data=True)
        params = jax.tree.map(place, partitioning.unbox(boxed), specs)
        x = place(jax.ShapeDtypeStruct(shape, jnp.bfloat16), PartitionSpec(('data', 'expert')))
        step = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=jax.tree.map(lambda a: a.sharding, (params, x)))
        program = step.lower(params, x).compile()
    text = program.as_text()
    if keep := os.environ.get('KEEP_HLO'):
        pathlib.Path(keep, f'{exchange}.txt').write_text(text, 'utf-8')
    wire = sum(collective.wire_bytes for collective in Program(text).collectives().values())
    return program.memory_analysis().temp_size_in_bytes / 1e9, wire / 1e9, time.monotonic() - begin


def drawn(skewed: bool, shards: int) -> np.ndarray:
    """Draws the choices of each device of a group for each expert, (S, E)."""
    rng = np.random.default_rng(0)
    likes = np.array([20.0] + [0.0] * (E - 1)) if skewed else np.zeros(E)
    scores = rng.gumbel(size=(shards, TOKENS, E)) + likes
    chosen = np.argsort(-scores, axis=-1)[..., :K]
    return np.stack([np.bincount(of_device.reshape(-1), minlength=E) for of_device in chosen])


def visited(sizes: np.ndarray, rows: int) -> tuple[float, int]:
    """Returns the rows in the tiles that the kernels visit, a mean over the products, and those with an expert."""
    tiles = [product_tiles(rows, len(sizes), D, F, 2)[0], product_tiles(rows, len(sizes), F, D, 2)[0]]
    tiles += [gradient_tiles(rows, len(sizes), D, F, 2)[0]]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    counts = [tile * (-(-ends // tile) - starts // tile)[sizes > 0].sum() for tile in tiles]
    return float(np.mean(counts)), int(sizes.sum())


def load_of(exchange: str, counts_SxE: np.ndarray) -> tuple[float, int, float]:
    """Returns the share of dropped choices; rows with an expert and rows in visited tiles, of the busiest device."""
    S = len(counts_SxE)
    wanted_SxS = counts_SxE.reshape(S, S, -1).sum(axis=2)
    room = int(S * np.ceil(FACTOR * ROWS / S))
    if exchange == 'ring':
        stops = [[visited(own, ROWS) for own in counts_SxE.reshape(S, S, -1)[:, d]] for d in range(S)]
        busiest = max(([sum(column) for column in zip(*device, strict=True)] for device in stops), key=lambda n: n[0])
        # The ring computes its hidden activations again: four products for three.
        return 0.0, busiest[1], busiest[0] * 4 / 3
    if exchange == 'all_to_all':
        kept_SxS = np.minimum(wanted_SxS, room // S)
    else:
        kept_SxS = np.asarray(allowances(jnp.asarray(wanted_SxS), room))
    # One expert a device, as here, so that a device's rows are one run.
    rows = max(visited(np.array([kept]), room) for kept in kept_SxS.sum(axis=0))
    return 1 - kept_SxS.sum() / wanted_SxS.sum(), rows[1], rows[0]


def rows_of(exchange: str, mesh: jax.sharding.Mesh) -> list[list[str]]:
    """Returns the rows of the table for an exchange."""
    temporaries, wire, seconds = compiled(exchange, mesh)
    rows = []
    for load in ('even', 'half on one expert'):
        dropped, used, visits = load_of(exchange, drawn(load != 'even', mesh.shape['expert']))
        rows.append(
            [exchange, load, f'{dropped:.3f}', str(used), f'{visits / used:.3f}', f'{visits * ROW_FLOPS / 1e12:.2f}']
            + [f'{temporaries:.2f}', f'{wire:.2f}', f'{seconds:.0f}']
        )
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=CASES)
    arguments = parser.parse_args()
    topology = topologies.get_topology_desc(platform='tpu', topology_name=f'v5p:{SLICE}')
    mesh = partitioning.make_mesh(MESH, E, topology.devices)
    rows = [row for exchange in arguments.only or CASES for row in rows_of(exchange, mesh)]
    print(f'an even share is {ROWS} rows, {ROWS * ROW_FLOPS / 1e12:.2f} TFLOP')
    print(table(HEAD, rows))
    if not arguments.only:
        with CSV.open('w', encoding='utf-8', newline='') as stream:
            csv.writer(stream, lineterminator='\n').writerows([HEAD, *rows])


if __name__ == '__main__':
    main()
