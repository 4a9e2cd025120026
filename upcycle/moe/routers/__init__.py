"""Routers, one class each. To add one, add a file here, a name to `conventions.RouterType` and a line to `ROUTERS`."""

from upcycle.moe.conventions import RouterType
from upcycle.moe.routers.base import MoE
from upcycle.moe.routers.dense import Dense
from upcycle.moe.routers.expert_choice import ExpertChoice
from upcycle.moe.routers.merged import Merged
from upcycle.moe.routers.soft import Soft
from upcycle.moe.routers.top_k import TopK

ROUTERS: dict[RouterType, type[MoE]] = {
    RouterType.EXPERT_CHOICE: ExpertChoice,
    RouterType.TOP_K: TopK,
    RouterType.SOFT: Soft,
    RouterType.DENSE: Dense,
    RouterType.MERGED: Merged,
}
