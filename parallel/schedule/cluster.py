"""Clusters as numbers, and the profile that they promise before anything was measured.

Read `profiles.py` first. A cluster is nodes (ranks within reach of the fast links, such as
NVLink), a network port per rank (its rail), switches that join some nodes, and a spine above
them that may be oversubscribed. A collective takes as long as its slowest kind of link: bytes over
bandwidth, plus a start and a little for each message. `conf/cluster/` has examples.
"""

import math
from dataclasses import dataclass, fields

from gatewise.parallel.errors import ConfigError
from gatewise.parallel.schedule.cost import Cost, Interference
from gatewise.parallel.schedule.profiles import Layout, Profile

__all__ = ["Cluster", "cluster_profile", "point_to_point"]

_MS_PER_US = 1e-3
_GB = 1e9


@dataclass(kw_only=True, slots=True)
class Cluster:
    """One cluster; bandwidths are GB/s of one rank in one direction, as they are sold."""

    name: str
    source: str  # where the numbers come from
    nodes: int
    ranks_per_node: int
    memory_gb: float  # of one rank, 1e9 bytes
    tflops: float  # peak of dense matrix products in the training dtype
    memory_gbps: float  # of the device's own memory
    node_gbps: float  # within the node
    rail_gbps: float  # out of the node
    product_efficiency: float = 0.6  # share of `tflops` that large products reach
    attention_efficiency: float = 0.45  # the same of attention
    link_efficiency: float = 0.8  # share of a bandwidth that large messages reach
    launch_us: float = 8.0  # start of a computation
    node_latency_us: float = 12.0  # start of a collective within the node
    rail_latency_us: float = 25.0  # start of a collective between nodes
    message_us: float = 0.5  # each further message of a collective
    rail_nodes: int = 32  # nodes that reach each other without the spine
    spine_oversubscription: float = 1.0  # bandwidth below the spine over that through it
    lanes_disturb: float = 0.0  # extra time of each communication lane beside the other one
    compute_disturbs: float = 0.0  # extra time of computation and communication side by side

    def __post_init__(self) -> None:
        at_least_zero = ("node_latency_us", "rail_latency_us", "message_us", "launch_us")
        shares = ("product_efficiency", "attention_efficiency", "link_efficiency")
        for item in fields(self):
            value = getattr(self, item.name)
            name = f"cluster.{item.name}"
            if isinstance(value, str):
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}; it must be finite")
            if item.name in shares:
                if not 0 < value <= 1:
                    raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
            elif item.name in at_least_zero or item.name.endswith(("disturb", "disturbs")):
                if value < 0:
                    raise ValueError(f"{name} is {value}; it must be at least 0")
            elif item.name == "spine_oversubscription":
                if value < 1:
                    raise ValueError(f"{name} is {value}; it must be at least 1 (no loss)")
            elif value <= 0:
                raise ValueError(f"{name} is {value}; it must be above 0")

    @property
    def ranks(self) -> int:
        """Number of ranks of the whole cluster."""
        return self.nodes * self.ranks_per_node

    @property
    def interference(self) -> Interference:
        """What lanes that are busy at once cost."""
        return Interference.mutual(
            {
                ("inter", "intra"): self.lanes_disturb,
                ("compute", "inter"): self.compute_disturbs,
                ("compute", "intra"): self.compute_disturbs,
            }
        )


def cluster_profile(cluster: Cluster, layout: Layout) -> Profile:
    """Return what the operations of a layout should cost.

    Args:
        cluster: the machine.
        layout: uses its nodes from the first one on.

    Raises:
        ConfigError: if the layout needs more ranks or other nodes than the cluster has.
    """
    if layout.ranks > cluster.ranks:
        raise ConfigError(
            f"ranks is {layout.ranks}, but cluster {cluster.name} has {cluster.ranks} "
            f"({cluster.nodes} nodes of {cluster.ranks_per_node}); use at most these"
        )
    if layout.ranks_per_node != min(cluster.ranks_per_node, layout.ranks):
        raise ConfigError(
            f"ranks_per_node is {layout.ranks_per_node}, but cluster {cluster.name} has nodes of "
            f"{cluster.ranks_per_node} ranks"
        )
    mac_ms = 2 / (cluster.tflops * 1e12) * 1e3
    launch_ms = cluster.launch_us * _MS_PER_US
    return Profile(
        layout,
        {
            "all_to_all": _all_to_all(cluster, layout),
            "all_gather": _ring(cluster, layout.shard),
            "reduce_scatter": _ring(cluster, layout.shard),
            "all_reduce": _all_reduce(cluster, layout),
            "experts": Cost(launch_ms, mac_ms / cluster.product_efficiency),
            "attention": Cost(launch_ms, mac_ms / cluster.attention_efficiency),
            "memory": Cost(launch_ms, _ms_per_byte(cluster, cluster.memory_gbps)),
        },
        cluster.interference,
        f"computed from cluster {cluster.name}",
    )


def point_to_point(cluster: Cluster, *, between_nodes: bool) -> Cost:
    """Return the cost of sending bytes from one rank to one other."""
    if between_nodes:
        alpha, bandwidth = cluster.rail_latency_us, cluster.rail_gbps
    else:
        alpha, bandwidth = cluster.node_latency_us, cluster.node_gbps
    return Cost(alpha * _MS_PER_US, _ms_per_byte(cluster, bandwidth))


def _ms_per_byte(cluster: Cluster, gbps: float) -> float:
    return 1e3 / (gbps * _GB * cluster.link_efficiency)


def _start_ms(cluster: Cluster, members: int, *, between_nodes: bool) -> float:
    if members == 1:
        return 0.0
    latency = cluster.rail_latency_us if between_nodes else cluster.node_latency_us
    return (latency + cluster.message_us * (members - 1)) * _MS_PER_US


def _all_to_all(cluster: Cluster, layout: Layout) -> Cost:
    """Cost by the bytes of one rank, its own part included, spread evenly over the group."""
    members, near = layout.expert, layout.expert_ranks_per_node
    within = (near - 1) / members * _ms_per_byte(cluster, cluster.node_gbps)
    rail = _ms_per_byte(cluster, cluster.rail_gbps)
    leave = (members - near) / members * rail
    reach = min(members, near * cluster.rail_nodes)
    spine = (members - reach) / members * rail * cluster.spine_oversubscription
    alpha = _start_ms(cluster, members, between_nodes=layout.expert_spans_nodes)
    return Cost(alpha, max(within, leave, spine))


def _ring(cluster: Cluster, members: int) -> Cost:
    """Cost of all-gather or reduce-scatter within the node, by the gathered bytes."""
    share = (members - 1) / members
    alpha = _start_ms(cluster, members, between_nodes=False)
    return Cost(alpha, share * _ms_per_byte(cluster, cluster.node_gbps))


def _all_reduce(cluster: Cluster, layout: Layout) -> Cost:
    """Cost of summing gradients over the copies of a tensor: first in the node, then between.

    Ranks that hold the same dense parameters stand `shard` apart in one node.
    """
    near = min(layout.data, max(1, layout.ranks_per_node // layout.shard))
    nodes = max(1, layout.data // near)
    within = 2 * (near - 1) / near * _ms_per_byte(cluster, cluster.node_gbps)
    slow = cluster.spine_oversubscription if nodes > cluster.rail_nodes else 1.0
    between = 2 * (nodes - 1) / nodes / near * _ms_per_byte(cluster, cluster.rail_gbps) * slow
    alpha = 2 * (
        _start_ms(cluster, near, between_nodes=False)
        + _start_ms(cluster, nodes, between_nodes=True)
    )
    return Cost(alpha, within + between)
