"""Values of several seeds: their mean and its confidence interval."""

import dataclasses
import math
import statistics

_T_975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One value per seed.

    Attributes:
      values: in the order of the seeds; None for a seed without a value.
    """

    values: tuple[float | None, ...]

    @property
    def known(self) -> list[float]:
        """The values of the seeds that have one."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that have a value; None if no seed has one."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def half_width(self) -> float | None:
        """Half of the 95% Student t interval of the mean; None for fewer than two values.

        Beyond ten degrees of freedom, t is a series expansion (0.1% low at eleven).
        """
        n = len(self.known) - 1
        if n < 1:
            return None
        z = statistics.NormalDist().inv_cdf(0.975)
        expansion = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n * n)
        t = _T_975[n - 1] if n <= len(_T_975) else expansion
        return t * statistics.stdev(self.known) / math.sqrt(n + 1)

    def text(self, spec: str, scale: float = 1.0) -> str:
        """Formats the mean and its interval, such as '+0.1200 ± 0.0300'; '–' without a value.

        Args:
          spec: format of the mean; the half width has no sign.
          scale: multiplies both.
        """
        if self.mean is None:
            return '–'
        spread = '' if self.half_width is None else f' ± {scale * self.half_width:{spec.lstrip("+")}}'
        return f'{scale * self.mean:{spec}}{spread}'
