"""Unit of cluster: one layer."""

import numpy as np

from stages.cluster.linkage import FEATURES, all_cuts, link
from stages.common import tables
from stages.common.paths import dendrogram_file, labels_file, statistics_file
from stages.common.schemas import DENDROGRAM, LABELS, write_table
from stages.common.unit import Job, UnitResult


def cluster_unit(job: Job) -> UnitResult:
    """Write the dendrogram and all its cuts of one layer. args: statistics_dir, layer, feature, distance, linkage."""
    args, layer = job.args, job.args["layer"]
    statistics = tables.statistics(statistics_file(job.run_dir / args["statistics_dir"], layer))
    linkage_Z = link(FEATURES[args["feature"]](statistics), args["distance"], args["linkage"], f"layer {layer}")
    columns = {
        "left": linkage_Z[:, 0].astype(np.int32),
        "right": linkage_Z[:, 1].astype(np.int32),
        "distance": linkage_Z[:, 2],
        "num_experts": linkage_Z[:, 3].astype(np.int32),
    }
    dendrogram = write_table(dendrogram_file(job.stage_dir, layer), columns, DENDROGRAM)
    labels = write_table(labels_file(job.stage_dir, layer), all_cuts(linkage_Z), LABELS)
    return UnitResult((dendrogram, labels), facts={"largest_distance": float(linkage_Z[-1, 2])})
