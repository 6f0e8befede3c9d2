"""Unit of cluster: one layer."""

import numpy as np

from stages.cluster.certainty import relative_standard_errors, stability
from stages.cluster.linkage import FEATURES, all_cuts, link
from stages.contracts import tables
from stages.contracts.paths import dendrogram_file, errors_file, groups_file, labels_file, stability_file, statistics_file
from stages.contracts.schemas import DENDROGRAM, ERRORS, LABELS, STABILITY, write_table
from stages.contracts.units import Job, UnitResult
from stages.io.files import WrittenFile


def cluster_unit(job: Job) -> UnitResult:
    """Write the dendrogram and all its cuts of one layer; under sampling also how certain they are.

    args: statistics_dir, layer, feature, distance, linkage, is_sampled, seed (of the halves that are compared).
    """
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
    certainty = _write_certainty(job, statistics, linkage_Z) if args["is_sampled"] else ()
    return UnitResult((dendrogram, labels, *certainty), facts={"largest_distance": float(linkage_Z[-1, 2])})


def _write_certainty(job: Job, statistics: tables.Statistics, linkage_Z: tables.Array) -> tuple[WrittenFile, WrittenFile]:
    args, layer = job.args, job.args["layer"]
    num_sampled_G, output_sum_EGD = tables.output_groups(groups_file(job.run_dir / args["statistics_dir"], layer))
    errors_E = relative_standard_errors(num_sampled_G, output_sum_EGD)
    errors = {"expert": np.arange(len(errors_E), dtype=np.int32), "relative_standard_error": errors_E}
    columns = stability(statistics, num_sampled_G, output_sum_EGD, linkage_Z, args, args["seed"])
    return (
        write_table(errors_file(job.stage_dir, layer), errors, ERRORS),
        write_table(stability_file(job.stage_dir, layer), columns, STABILITY),
    )
