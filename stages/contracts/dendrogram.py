"""The dendrogram of a layer's experts, its cuts, and the cluster labels of its cuts into every number of clusters.

Dimensions: E experts, K clusters. A linkage matrix Z [E-1, 4] has scipy's columns: left, right, distance, number of experts.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from stages.contracts.arrow import Array, read_table, write_table
from stages.io.files import WrittenFile

_DENDROGRAM = pa.schema(
    [
        pa.field("left", pa.int32(), False),
        pa.field("right", pa.int32(), False),
        pa.field("distance", pa.float64(), False),
        pa.field("num_experts", pa.int32(), False),
    ],
    metadata={
        "table": "one merge a row, in order (scipy.cluster.hierarchy.linkage)",
        "left, right": "an expert (< E), or E + i for the cluster made in row i",
        "distance": "distance of the two in the units of the feature",
        "num_experts": "experts in the new cluster",
    },
)

_LABELS = pa.schema(
    [
        pa.field("num_clusters", pa.int32(), False),
        pa.field("expert", pa.int32(), False),
        pa.field("label", pa.int32(), False),
    ],
    metadata={
        "table": "for every K from 1 to E, the cluster of every expert",
        "label": "0 .. K-1, clusters numbered by their smallest member",
    },
)


def write_dendrogram(path: Path, linkage_Z: Array) -> WrittenFile:
    """Write a linkage matrix."""
    columns = {
        "left": linkage_Z[:, 0].astype(np.int32),
        "right": linkage_Z[:, 1].astype(np.int32),
        "distance": linkage_Z[:, 2],
        "num_experts": linkage_Z[:, 3].astype(np.int32),
    }
    return write_table(path, columns, _DENDROGRAM)


def read_dendrogram(path: Path) -> Array:
    """The linkage matrix [E-1, 4] of a layer."""
    table = read_table(path)
    return np.stack([table[name].to_numpy().astype(np.float64) for name in _DENDROGRAM.names], axis=1)


def write_labels(path: Path, labels_KE: Array) -> WrittenFile:
    """Write the cluster label of every expert, for the cuts into 1, 2, ... E clusters."""
    num_experts = labels_KE.shape[1]
    columns = {
        "num_clusters": np.repeat(np.arange(1, num_experts + 1, dtype=np.int32), num_experts),
        "expert": np.tile(np.arange(num_experts, dtype=np.int32), num_experts),
        "label": labels_KE.reshape(-1),
    }
    return write_table(path, columns, _LABELS)


def read_labels(path: Path, num_clusters: int) -> Array:
    """Cluster label int32 [E] of every expert, for the cut into num_clusters clusters."""
    table = read_table(path)
    rows = table["num_clusters"].to_numpy() == num_clusters
    return table["label"].to_numpy()[rows]  # type: ignore[no-any-return]


def cut(linkage_Z: Array, num_clusters: int) -> Array:
    """Labels [E] of the cut to exactly num_clusters: the first E-K merges of the dendrogram, replayed.

    Replayed, since `fcluster` returns fewer clusters than asked for when distances tie. Clusters are numbered by their
    smallest member.
    """
    num_experts = len(linkage_Z) + 1
    assert 1 <= num_clusters <= num_experts
    members: dict[int, list[int]] = {expert: [expert] for expert in range(num_experts)}
    for step in range(num_experts - num_clusters):
        left, right = int(linkage_Z[step, 0]), int(linkage_Z[step, 1])
        members[num_experts + step] = members.pop(left) + members.pop(right)
    labels = np.empty(num_experts, dtype=np.int32)
    for label, cluster in enumerate(sorted(members.values(), key=min)):
        labels[cluster] = label
    return labels


def all_cuts(linkage_Z: Array) -> Array:
    """Labels [K, E] of the cuts to 1, 2, ... E clusters."""
    return np.stack([cut(linkage_Z, k) for k in range(1, len(linkage_Z) + 2)])
