"""Comparisons on one model: runs, and what the paper says of them."""

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
      setting: of the model.
      title: of its page.
      branches: by label; a label is the name of its runs, the same in every experiment.
      curves: labels whose curves are drawn; None: all.
      seeds: in place of the experiment's; None: those.
      downstream: every branch, and the dense run, is fine-tuned on it, and these runs are compared.
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
        """Of what is compared: the branches, and where they are fine-tuned, the dense run too."""
        return {*self.branches, *(() if self.downstream is None else ('dense',))}

    def claim(self, text: str, better: str, worse: str, **options: Any) -> None:
        """A statement of the paper that these runs can contradict.

        Args:
          text: in words.
          better, worse: labels; the first has the better metric.
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
        """A plot of the last (or first) values of runs against the setting in which they differ.

        Args:
          xlabel: the name of that setting.
          series: name: {value: label}.
          log: the axis counts doublings.
          metrics: a panel each.
          at_start: the first evaluation instead of the last.
        """
        missing = {label for points in series.values() for label in points.values()} - self.labels
        assert not missing, missing
        rows = {name: [[x, label] for x, label in points.items()] for name, points in series.items()}
        self.finals.append(
            {'xlabel': xlabel, 'series': rows, 'log': log, 'metrics': list(metrics), 'at_start': at_start}
        )

    def table(self, rows: Mapping[str, Sequence[float]], metrics: Sequence[str]) -> None:
        """The paper's table, shown next to the last values of these runs.

        Args:
          rows: label: the paper's numbers, in per cent, one for each metric.
          metrics: of a run's last evaluation.
        """
        missing = rows.keys() - self.branches.keys()
        assert not missing, missing
        self.numbers = {'metrics': list(metrics), 'rows': [[label, list(values)] for label, values in rows.items()]}
