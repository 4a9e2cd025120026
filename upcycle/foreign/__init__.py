"""Surgery on foreign models: rules describe the paths of their parameter trees. Rules -> outline -> plan -> surgery.

A plan uses our names for their leaves ('params/block_1/mlp/expert/Dense_0/kernel') and puts experts first. Results, receipts and
messages use the user's names.
"""

from upcycle.foreign.rules import MoERule, PathRules, State
from upcycle.foreign.surgery import plan_foreign, upcycle_foreign

__all__ = ['MoERule', 'PathRules', 'State', 'plan_foreign', 'upcycle_foreign']
