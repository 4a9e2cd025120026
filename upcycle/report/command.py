"""`upcycle report`: writes a table and an HTML page from run folders."""

import pathlib
import re
from collections.abc import Sequence

from etils import epath

from upcycle import files, outputs
from upcycle.errors import UserError
from upcycle.report.compare import compare_seeds
from upcycle.report.html import write_report
from upcycle.report.runs import Role, Run, load_run
from upcycle.report.tables import print_table

_SEED = re.compile(r'[ _-]?seed[ _=-]?(\d+)', re.IGNORECASE)


def report_main(run_dirs: Sequence[str], out: str) -> pathlib.Path:
    """`upcycle report`: reads run folders, prints the table and writes the report into `out`.

    Args:
      run_dirs: run folders, or folders that contain run folders at any depth. Runs whose name or parent folder is `seed_0`,
        `seed_1`, ... are seeds of one branch; a run without a seed in its name belongs to every seed.
      out: folder of the report.

    Returns:
      The path of `report.html`.
    """
    outputs.check('--out', out, outputs.Kind.FOLDER, local=True)
    groups = _by_seed(_run_folders(run_dirs))
    print_table(compare_seeds(groups))
    command = 'upcycle report ' + ' '.join(run_dirs) + f' --out {out}'
    return write_report(
        groups, out, 'Sparse upcycling: what the extra cost bought', {'command of this report': command}
    )


def _run_folders(run_dirs: Sequence[str]) -> list[epath.Path]:
    """Returns the given run folders and the run folders in given folders, each once.

    Raises:
      UserError: a given folder contains no run folder.
    """
    folders: dict[epath.Path, None] = {}
    for given in map(files.absolute, run_dirs):
        if (given / 'metrics.jsonl').is_file():
            runs = [given]
        else:
            runs = sorted(folder for folder, _, names in given.walk() if 'metrics.jsonl' in names)
        if not runs:
            raise UserError(f'{given} contains no metrics.jsonl: name the MODEL_DIR of a run, or a folder of runs.')
        folders |= dict.fromkeys(runs)
    return list(folders)


def _by_seed(folders: Sequence[epath.Path]) -> list[dict[str, Run]]:
    """Returns the runs by name, one mapping per seed, in the order of roles; see `report_main`."""
    seeds: dict[str, dict[str, Run]] = {}
    for folder in folders:
        seed = _SEED.search('/'.join(folder.resolve().parts[-2:]))
        run = load_run(folder)
        name = _SEED.sub('', run.name).strip(' -') or run.role.value
        group = seeds.setdefault(seed.group(1) if seed else '', {})
        if name in group:
            name = f'{folder.resolve().parent.name}/{name}'
        group[name] = run
    shared = seeds.pop('', {})
    groups = [{**shared, **group} for _, group in sorted(seeds.items(), key=lambda item: int(item[0]))] or [shared]
    order = list(Role)
    return [dict(sorted(group.items(), key=lambda item: order.index(item[1].role))) for group in groups]
