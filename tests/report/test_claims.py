"""Claims: which branch is better at which cost, and when the seeds decide it."""

import pytest

from tests.report.test_budgets import run
from upcycle.report.claims import Claim, as_markdown, judge
from upcycle.report.numbers import Numbers, ends, write_csv
from upcycle.report.numbers import as_markdown as numbers_as_markdown
from upcycle.report.plots.ends import Final, final_plot
from upcycle.report.runs import Role


def seeds(*gaps):
    """'ours' is `gap` ahead in loss everywhere and ends after 100 FLOPs, 'theirs' after 80."""
    return [
        {
            'ours': run('ours', lambda x, gap=gap: 2 - 0.01 * x - gap),
            'theirs': run('theirs', lambda x: 2 - 0.01 * x, role=Role.DENSE_CONTINUATION, steps=range(0, 81, 2)),
        }
        for gap in gaps
    ]


CLAIM = Claim('Ours ends ahead.', 'ours', 'theirs')


def test_a_claim_holds_where_the_interval_excludes_zero():
    verdict = judge(CLAIM, seeds(0.1, 0.12, 0.11))
    assert verdict.values == pytest.approx((-0.1, -0.12, -0.11))
    assert verdict.half_width == pytest.approx(4.302653 * 0.01 / 3**0.5)
    assert verdict.word == 'holds'
    assert verdict.standard_errors == pytest.approx(0.11 / (0.01 / 3**0.5))


def test_the_other_way_round_it_does_not_hold():
    verdict = judge(Claim('Theirs ends ahead.', 'theirs', 'ours'), seeds(0.1, 0.12, 0.11))
    assert verdict.word == 'does not hold' and verdict.standard_errors < 0
    # Of a metric of which more is better the sign turns.
    assert judge(Claim('', 'ours', 'theirs', metric='accuracy'), seeds(0.1, 0.12)).word == 'undecided'


@pytest.mark.parametrize('gaps', [(0.1, -0.1, 0.05), (0.1,)])
def test_it_is_undecided_where_seeds_differ_or_are_alone(gaps):
    verdict = judge(CLAIM, seeds(*gaps))
    assert verdict.word == 'undecided'
    assert verdict.mean == pytest.approx(-sum(gaps) / len(gaps))


def test_the_cost_of_the_comparison():
    steep = [
        {
            'ours': run('ours', lambda x: 3 - 0.02 * x),
            'theirs': run('theirs', lambda x: 2 - 0.001 * x),
        }
    ]
    # Sunk cost 500: a tenth of it is 50 FLOPs; the mean over the last twentieth before it is at 48.75.
    at_tenth = judge(Claim('', 'ours', 'theirs', at=0.1), steep).mean
    assert at_tenth == pytest.approx(3 - 0.02 * 48.75 - (2 - 0.001 * 48.75))
    assert judge(Claim('', 'ours', 'theirs', at=0.0), steep).mean == pytest.approx(1.0)
    assert judge(Claim('', 'ours', 'theirs', at=0.5), steep).mean is None
    assert judge(Claim('', 'ours', 'nowhere'), steep).word == 'undecided'


def test_a_run_from_nothing_may_spend_the_dense_cost_too():
    # Of 600 FLOPs; the branch starts when 500 are spent, and ends 80 later.
    pair = [
        {
            'scratch': run('scratch', lambda x: 4 - 0.005 * x, Role.SCRATCH, range(0, 601, 2), start_step=0, sunk=0.0),
            'theirs': run('theirs', lambda x: 2 - 0.01 * x, steps=range(0, 81, 2)),
        }
    ]
    middle = 0.975 * 80
    assert judge(Claim('', 'scratch', 'theirs'), pair).mean == pytest.approx(2 + 0.005 * middle)
    whole = judge(Claim('', 'scratch', 'theirs', whole=True), pair).mean
    assert whole == pytest.approx(4 - 0.005 * (500 + middle) - (2 - 0.01 * middle))


def test_a_claim_of_no_difference_needs_an_interval_within_its_bounds():
    def word(within, *gaps):
        return judge(Claim('', 'ours', 'theirs', within=within), seeds(*gaps)).word

    assert word(0.05, 0.01, -0.01, 0.0) == 'holds'
    assert word(0.02, 0.01, -0.01, 0.0) == 'undecided'  # the interval is +- 0.025
    assert word(0.05, 0.1, 0.12, 0.11) == word(0.05, -0.1, -0.12, -0.11) == 'does not hold'
    assert word(0.05, 0.01) == 'undecided'
    assert judge(Claim('', 'ours', 'theirs', within=0.0), seeds(-0.1, -0.12)).standard_errors > 0


def test_a_difference_of_differences():
    """'ours' is ahead of 'theirs' by 0.1 to 0.12, and further by 0.05 than 'other' is."""
    runs = [
        {**group, 'other': run('other', lambda x, gap=gap: 2 - 0.01 * x - gap + 0.05)}
        for group, gap in zip(seeds(0.1, 0.12), (0.1, 0.12), strict=True)
    ]
    verdict = judge(Claim('', 'ours', 'theirs', than=('other', 'theirs')), runs)
    assert verdict.values == pytest.approx((-0.05, -0.05)) and verdict.word == 'holds'
    assert judge(Claim('', 'ours', 'theirs', than=('nowhere', 'theirs')), runs).mean is None
    assert '(ours less theirs) less (other less theirs)' in as_markdown([verdict])


def test_step_by_step():
    """Half as many steps of twice the cost: equal at equal FLOPs, ahead at equal steps."""
    dear = run('dear', lambda x: 2 - 0.01 * x, steps=range(0, 51, 2), step_flops=2.0)
    pair = [{'dear': dear, 'theirs': run('theirs', lambda x: 2 - 0.01 * x)}]
    assert judge(Claim('', 'dear', 'theirs'), pair).mean == pytest.approx(0)
    assert judge(Claim('', 'dear', 'theirs', per_step=True), pair).mean == pytest.approx(-0.01 * 0.975 * 50)


def test_the_papers_numbers_stand_beside_ours(tmp_path):
    table = Numbers(('accuracy', 'few_shot/10shot'), (('ours', (52.8, 74.8)), ('absent', (50.0, 70.0))))
    found = ends(table, seeds(0.1, 0.2))
    lines = numbers_as_markdown(table, found).splitlines()
    assert lines[2] == '| branch | accuracy, % | paper | few_shot/10shot, % | paper |'
    assert lines[4] == '| ours | 50.00 ± 0.00 | 52.80 | – | 74.80 |'
    assert lines[5] == '| absent | – | 50.00 | – | 70.00 |'
    write_csv(found, tmp_path / 'numbers.csv')
    assert (tmp_path / 'numbers.csv').read_text().splitlines()[1:] == [
        'ours,accuracy,1,50.0,52.8',
        'ours,accuracy,2,50.0,52.8',
    ]


def test_the_table():
    lines = as_markdown([judge(CLAIM, seeds(0.1, 0.12, 0.11))]).splitlines()
    assert lines[2].startswith('| Ours ends ahead. | loss, ours less theirs | -0.1100 ± 0.0248 | 3 | holds (+19.1 ')


def test_a_plot_of_ends():
    final = Final('experts', {'ours': [(2, 'ours')], 'theirs': [(2, 'theirs'), (4, 'absent')]}, log=True)
    plot = final_plot(final, seeds(0.1, 0.2), 'ends_1')
    assert plot.png()[:4] == b'\x89PNG'
    assert (plot.key, len(plot.panels)) == ('ends_1', 2)
