"""Chooses the peak learning rate of `upcycle quickstart --family=llm`, and writes docs/benchmarks/quickstart_llm.csv.

  python scripts/bench/quickstart_llm.py              # trains every run that the CSV lacks; stop it at any time
  python scripts/bench/quickstart_llm.py --only=1e-2 --seed=2  # one of them, for several processes at once
  python scripts/bench/quickstart_llm.py --table      # prints the mean of each rate, and the chosen one

The rule, written before the runs: for each of `RATES` and seeds 0 to 2, the quickstart's dense run; the rate is that with the
lowest mean validation loss at its end. So the choice knows nothing of upcycling. If it is the first or last of `RATES`, another
one follows there, a factor of 2.5 away. Nothing else is varied. RATES began with 4e-3, 1e-2 and 2.5e-2; the last was stopped at
step 700 of seed 0, 0.11 nats behind 1e-2 in training loss, and 1.6e-3 followed, since 4e-3 was ahead.
"""

import argparse
import csv
import os
import pathlib
import statistics
from collections.abc import Sequence

CSV = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'benchmarks' / 'quickstart_llm.csv'
RATES = ('1.6e-3', '4e-3', '1e-2')
SEEDS = (0, 1, 2)
KEY = ('BASE_LEARNING_RATE', 'seed')
COLUMNS = (*KEY, 'steps', 'validation loss')


def rows() -> list[dict[str, str]]:
    """Returns the rows of the CSV; [] if there is none."""
    if not CSV.exists():
        return []
    with CSV.open(encoding='utf-8') as file:
        return list(csv.DictReader(file))


def train(folder: str, rates: Sequence[str], seeds: Sequence[int]) -> None:
    """Trains the runs that the CSV lacks, all rates of a seed first, and appends a row for each."""
    from upcycle import quickstart
    from upcycle.commands import train as command
    from upcycle.models.quickstart import JOBS

    for seed in seeds:
        for rate in rates:
            place = os.path.join(folder, f'rate_{rate}', f'seed_{seed}')
            dense = quickstart.branches(JOBS['llm'], place, 1.0, seed)[0]
            if (rate, str(seed)) in {tuple(row[name] for name in KEY) for row in rows()}:
                continue
            steps = dense.bindings['TRAIN_STEPS']
            if not dense.finished(int(steps)):
                bindings = {**dense.bindings, 'BASE_LEARNING_RATE': rate}
                command.run(dense.gin_files, bindings, f'dense (rate {rate}, seed {seed})')
            losses = [line['loss'] for line in dense.records() if line['split'] == 'validation']
            new = not CSV.exists()
            with CSV.open('a', encoding='utf-8') as file:
                writer = csv.writer(file, lineterminator='\n')
                writer.writerows([COLUMNS] if new else [])
                writer.writerow([rate, seed, steps, f'{losses[-1]:.4f}'])


def show() -> None:
    """Prints the means, and the rate that the rule chooses once all seeds are there."""
    losses: dict[str, list[float]] = {}
    for row in rows():
        losses.setdefault(row[KEY[0]], []).append(float(row['validation loss']))
    for rate, found in sorted(losses.items(), key=lambda item: float(item[0])):
        print(f'{rate:>8}  {statistics.mean(found):.4f}, the mean of {len(found)} seeds')
    if all(len(losses.get(rate, ())) == len(SEEDS) for rate in RATES):
        print(f'chosen: {min(losses, key=lambda rate: statistics.mean(losses[rate]))}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='runs/quickstart_llm_rates', help='folder of the runs')
    parser.add_argument('--only', choices=RATES, help='train the runs of this rate')
    parser.add_argument('--seed', type=int, choices=SEEDS, help='train the runs of this seed')
    parser.add_argument('--table', action='store_true', help='print the means instead')
    arguments = parser.parse_args()
    if not arguments.table:
        seeds = SEEDS if arguments.seed is None else [arguments.seed]
        train(arguments.out, [arguments.only] if arguments.only else RATES, seeds)
    show()


if __name__ == '__main__':
    main()
