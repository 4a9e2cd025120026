"""Comparisons on one model: its runs, and the paper's claims about them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.report.claims import Claim
from upcycle.sweep.paper.branch import Branch
from upcycle.sweep.paper.setting import Downstream, Setting


@dataclasses.dataclass
class Panel:
    """A comparison on one model: branches from one dense run, seed by seed.

    Attributes:
      setting: the setting of the model.
      title: title of the page.
      branches: by label; a label names the same run in every experiment.
      curves: labels whose curves are drawn; None: all.
      seeds: override the experiment's seeds; None: no override.
      downstream: a task on which the dense run and every branch are fine-tuned; then the fine-tuned runs are compared.
      claims: see `claim`.
      finals: see `final`.
      numbers: see `table`.
    """

    setting: Setting
    title: str
    branches: Mapping[str, Branch]
    curves: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    downstream: Downstream | None = None
    claims: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    finals: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    numbers: dict[str, Any] | None = None

    @property
    def labels(self) -> set[str]:
        """Labels of the compared runs: the branches, and also the dense run if they are fine-tuned."""
        return {*self.branches, *(() if self.downstream is None else ('dense',))}

    def claim(self, text: str, better: str, worse: str, **options: Any) -> None:
        """Adds a statement of the paper that these runs can contradict.

        Args:
          text: the statement in words.
          better, worse: labels; the first is claimed to have the better metric.
          options: other fields of a `Claim`.
        """
        claim = Claim(text, better, worse, **options)
        missing = {label for pair in claim.pairs for label in pair} - self.labels
        assert not missing, missing
        self.claims.append(dataclasses.asdict(claim))

    def final(
        self,
        xlabel: str,
        series: Mapping[str, Mapping[float, str]],
        *,
        log: bool = False,
        metrics: Sequence[str] = ('loss', 'accuracy'),
        at_start: bool = False,
    ) -> None:
        """Adds a plot of the final (or first) values of runs against the setting in which they differ.

        Args:
          xlabel: the name of the setting.
          series: labels by value of the setting, by the name of the series.
          log: whether the x axis is logarithmic, with base 2.
          metrics: one panel each.
          at_start: use the first evaluation instead of the last.
        """
        missing = {label for points in series.values() for label in points.values()} - self.labels
        assert not missing, missing
        rows = {name: [[x, label] for x, label in points.items()] for name, points in series.items()}
        self.finals.append(
            {'xlabel': xlabel, 'series': rows, 'log': log, 'metrics': list(metrics), 'at_start': at_start}
        )

    def table(self, rows: Mapping[str, Sequence[float]], metrics: Sequence[str]) -> None:
        """Adds the paper's table, shown next to the final values of these runs.

        Args:
          rows: the paper's numbers in per cent, one per metric, by label.
          metrics: metrics of a run's last evaluation.
        """
        missing = rows.keys() - self.branches.keys()
        assert not missing, missing
        self.numbers = {'metrics': list(metrics), 'rows': [[label, list(values)] for label, values in rows.items()]}
