"""GPUs, the nodes that they are in, and how fast they exchange data."""

from dataclasses import dataclass

from sophia_train.errors import ConfigError
from sophia_train.schema_check import choices
from sophia_train.throughput import PEAK_FLOPS

GPUS_PER_NODE = 8  # unless said otherwise
LINK_EFFICIENCY = 0.8  # of a link's datasheet rate that a collective gets; assumed, not measured


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        name: of the SXM part.
        memory: bytes that CUDA reports, rounded down.
        memory_bandwidth: bytes/s read and written.
        nvlink: bytes/s to the other GPUs of the node, in each direction.
        network: bytes/s to other nodes in NVIDIA's own, a GPU's share of its node's adapters.
    """

    name: str
    memory: int
    memory_bandwidth: float
    nvlink: float
    network: float

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.name.partition("-")[0]]


# Rates by NVIDIA's datasheets of the cards and of DGX A100, H100 and H200, but for the memory of the H200,
# whose rate is that of a copy measured on one.
CARDS = {
    card.name: card
    for card in (
        Card("A100", 79 << 30, 2.0e12, 300e9, 25e9),
        Card("A100-40GB", 39 << 30, 1.55e12, 300e9, 25e9),
        Card("H100", 79 << 30, 3.35e12, 450e9, 50e9),
        Card("H200", 139 << 30, 4.2e12, 450e9, 50e9),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal GPUs in equal nodes.

    Attributes:
        card: kind of GPU.
        gpus: all of them, one process each.
        gpus_per_node: those joined by NVLink.
        network: bytes/s between nodes in each direction, a GPU's share of its node's.
    """

    card: Card
    gpus: int
    gpus_per_node: int
    network: float

    @staticmethod
    def of(gpu: str, gpus: int, gpus_per_node: int | None = None, network: float | None = None) -> "Cluster":
        """Build a cluster from what a person says of it.

        Args:
            gpu: name of a card.
            gpus: how many.
            gpus_per_node: 8 where that is None, or all if there are fewer.
            network: Gbit/s of a GPU; None takes that of NVIDIA's own nodes.

        Raises:
            ConfigError: the card is unknown, or the GPUs do not fill their nodes.
        """
        if gpu not in CARDS:
            raise ConfigError(f"gpu={gpu}: nothing is known of it; {choices(gpu, list(CARDS))}")
        on_node = min(gpus, gpus_per_node or GPUS_PER_NODE)
        if gpus % on_node:
            fewer = gpus // on_node * on_node
            raise ConfigError(
                f"gpus={gpus} is not a multiple of gpus_per_node={on_node}; "
                f"use gpus={fewer} or {fewer + on_node}, or another gpus_per_node"
            )
        card = CARDS[gpu]
        return Cluster(card, gpus, on_node, card.network if network is None else network * 1e9 / 8)

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.gpus // self.gpus_per_node

    def ring_seconds(self, size: float, members: int, on_node: int) -> float:
        """Seconds of an all-gather or a reduce-scatter: (W - 1) / W of the data over the slowest link.

        An all-reduce is one after the other (Patarasuk and Yuan, 2009; NCCL's "bus bandwidth"). Where a group
        is on several nodes, its data are cut into rings that leave a node by different adapters, so that it
        has those of all its members there. Latency is left out.

        Args:
            size: bytes of what is gathered or scattered, the whole of it.
            members: processes of a group, W.
            on_node: how many of them share a node; all such groups communicate at once.
        """
        if members == 1:
            return 0.0
        rate = self.card.nvlink if on_node >= members else min(self.card.nvlink, on_node * self.network)
        return (members - 1) / members * size / (LINK_EFFICIENCY * rate)
