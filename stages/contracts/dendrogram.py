"""The dendrogram of a layer's experts, and the cluster labels of its cuts into every number of clusters.

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
