"""Models that are not ours: rules say what the paths of their parameter trees mean. Rules -> outline -> plan -> surgery.

In a plan their leaves get names of ours ('params/block_1/mlp/expert/Dense_0/kernel'), experts in front; what comes out, and what
is said of it, has theirs.
"""

from upcycle.foreign.rules import MoERule, PathRules, State
from upcycle.foreign.surgery import plan_foreign, upcycle_foreign

__all__ = ['MoERule', 'PathRules', 'State', 'plan_foreign', 'upcycle_foreign']
