"""`upcycle compile`: compiles a run's training step ahead of time for a TPU topology."""

import json
from collections.abc import Mapping, Sequence

from upcycle import compile as aot
from upcycle import configuration, outputs
from upcycle.errors import UserError


def run(
    gin_files: Sequence[str],
    bindings: Mapping[str, str],
    topology: str,
    *,
    num_slices: int = 1,
    utilization: float = 0.4,
    as_json: bool = False,
    out: str | None = None,
    hlo: str | None = None,
) -> None:
    """`upcycle compile`: prints memory, FLOPs and collectives of a run's training step, as compiled for a TPU topology.

    Args:
      gin_files, bindings: the configuration.
      topology: such as 'v4:4x4x4'.
      num_slices: number of slices joined by the data-centre network.
      utilization: assumed share of peak FLOPs, in (0, 1], for the estimate of time.
      as_json: print JSON instead of a table.
      out: file for the JSON.
      hlo: file for the compiled HLO text.

    Raises:
      UserError: an option or the configuration is wrong.
    """
    for name, path in (('--out', out), ('--hlo', hlo)):
        if path is not None:
            outputs.check(name, path, outputs.Kind.FILE)
    if not 0 < utilization <= 1:
        raise UserError(f'--utilization={utilization:g} must lie in (0, 1].')
    run = configuration.load_model(gin_files, bindings)
    account, text = aot.compile_run(run, topology, num_slices=num_slices)
    if hlo is not None:
        outputs.write('--hlo', hlo, text)
    result = json.dumps(aot.as_json(account, run, utilization), indent=1)
    if out is not None:
        outputs.write('--out', out, result + '\n')
    print(result if as_json else aot.show(account, run, utilization))
