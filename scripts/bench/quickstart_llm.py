"""Chooses the peak learning rate of `upcycle quickstart --family=llm`, and writes docs/benchmarks/quickstart_llm.csv.

  python scripts/bench/quickstart_llm.py              # trains every run that the CSV lacks; stop it at any time
  python scripts/bench/quickstart_llm.py --table      # prints the mean of each rate, and the chosen one

The rule, written before the first run: for each of `RATES` and seeds 0 to 2, the quickstart's dense run and dense continuation;
the rate is that with the lowest mean final validation loss of the continuation. So the choice favours the baseline, not
upcycling. If it is the first or last of `RATES`, another one follows there, a factor of 2.5 away. Nothing else is varied.
"""

import argparse
import csv
import os
import pathlib
import statistics

CSV = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'benchmarks' / 'quickstart_llm.csv'
RATES = ('4e-3', '1e-2', '2.5e-2')
SEEDS = (0, 1, 2)
BRANCHES = ('dense', 'dense_continuation')
KEY = ('BASE_LEARNING_RATE', 'seed', 'branch')
COLUMNS = (*KEY, 'steps', 'validation loss')


def rows() -> list[dict[str, str]]:
    """Returns the rows of the CSV; [] if there is none."""
    if not CSV.exists():
        return []
    with CSV.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def train(folder: str) -> None:
    """Trains the runs that the CSV lacks, all rates of a seed first, and appends a row for each."""
    from upcycle import quickstart
    from upcycle.commands import train as command
    from upcycle.models.quickstart import JOBS

    for seed in SEEDS:
        for rate in RATES:
            place = os.path.join(folder, f'rate_{rate}', f'seed_{seed}')
            for branch in quickstart.branches(JOBS['llm'], place, 1.0, seed):
                key = (rate, str(seed), branch.name)
                if branch.name not in BRANCHES or key in {tuple(row[name] for name in KEY) for row in rows()}:
                    continue
                steps = branch.bindings['TRAIN_STEPS']
                if not branch.finished(int(steps)):
                    bindings = {**branch.bindings, 'BASE_LEARNING_RATE': rate}
                    command.run(branch.gin_files, bindings, f'{branch.name} (rate {rate}, seed {seed})')
                losses = [line['loss'] for line in branch.records() if line['split'] == 'validation']
                new = not CSV.exists()
                with CSV.open('a', encoding='utf-8') as file:
                    writer = csv.writer(file, lineterminator='\n')
                    writer.writerows([COLUMNS] if new else [])
                    writer.writerow([*key, steps, f'{losses[-1]:.4f}'])


def show() -> None:
    """Prints the means, and the rate that the rule chooses once all seeds are there."""
    means = {}
    for rate in dict.fromkeys(row[KEY[0]] for row in rows()):
        for name in BRANCHES:
            losses = [float(r['validation loss']) for r in rows() if (r[KEY[0]], r['branch']) == (rate, name)]
            print(f'{rate:>8}  {name:<20}{statistics.mean(losses):.4f} of {len(losses)} seeds' if losses else '')
            if name == BRANCHES[1] and len(losses) == len(SEEDS):
                means[rate] = statistics.mean(losses)
    if len(means) >= len(RATES):
        print(f'chosen: {min(means, key=means.get)}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='runs/quickstart_llm_rates', help='folder of the runs')
    parser.add_argument('--table', action='store_true', help='print the means instead')
    arguments = parser.parse_args()
    if not arguments.table:
        train(arguments.out)
    show()


if __name__ == '__main__':
    main()
