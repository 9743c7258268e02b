"""Routers of the literature behind one contract: a stage that reads `hidden0` and says which experts, or which task group.

    LinearRouter        groups     a linear classifier on the mean token: the baseline
    ScarRouter          groups     expert queries that attend to few tokens, with sparse attention among tokens or without
    PhatgooseRouter     bias       a gate vector an expert; one more expert is one more row
    GliderRouter        bias       PHATGOOSE's logits plus a global term of the whole request
    TaskTableRouter     bias       PreMoe: the nearest task's recorded usage, as a mask
    SharedRoutedRouter  bias       DeepSeekMoE: shared experts always, routed ones by affinity, not renormalised

`stage` has the contract; each module names its paper and gives its equations.
"""

from edgeml_export.routers.attach import attach_bias_router, attach_group_router, router_entries
from edgeml_export.routers.glider import GliderRouter
from edgeml_export.routers.linear import LinearRouter
from edgeml_export.routers.phatgoose import PhatgooseRouter, train_gate
from edgeml_export.routers.saved import load_router, save_router
from edgeml_export.routers.scar import ScarRouter
from edgeml_export.routers.shared_routed import SharedRoutedRouter
from edgeml_export.routers.sparse import Buckets, density
from edgeml_export.routers.stage import BiasRouter, GroupRouter, bias_graph, group_graph, plain_norm
from edgeml_export.routers.task_table import TaskTableRouter

__all__ = [
    "BiasRouter",
    "Buckets",
    "GliderRouter",
    "GroupRouter",
    "LinearRouter",
    "PhatgooseRouter",
    "ScarRouter",
    "SharedRoutedRouter",
    "TaskTableRouter",
    "attach_bias_router",
    "attach_group_router",
    "bias_graph",
    "density",
    "group_graph",
    "load_router",
    "plain_norm",
    "router_entries",
    "save_router",
    "train_gate",
]
