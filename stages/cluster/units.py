"""Unit of cluster: one layer."""

import numpy as np

from stages.cluster.certainty import relative_standard_errors, stability
from stages.cluster.linkage import FEATURES, all_cuts, link
from stages.cluster.spec import ClusterArgs, ClusterFacts
from stages.contracts.certainty import write_errors, write_stability
from stages.contracts.dendrogram import write_dendrogram, write_labels
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import dendrogram_file, errors_file, labels_file, stability_file
from stages.contracts.units import Job, UnitResult


def cluster_unit(job: Job[ClusterArgs]) -> UnitResult[ClusterFacts]:
    """Write the dendrogram and all its cuts of one layer; under sampling also how certain they are."""
    args, layer = job.args, job.args.layer
    evidence = read_evidence(job.run_dir / args.calibrate_dir, layer)
    linkage_Z = link(FEATURES[args.feature](evidence), args.distance, args.linkage, f"layer {layer}")
    files = [
        write_dendrogram(dendrogram_file(job.part_dir, layer), linkage_Z),
        write_labels(labels_file(job.part_dir, layer), all_cuts(linkage_Z)),
    ]
    if evidence.groups is not None:
        files.append(write_errors(errors_file(job.part_dir, layer), relative_standard_errors(evidence.groups)))
        equal_share_K, index_K = stability(evidence, linkage_Z, args.feature, args.distance, args.linkage, args.seed)
        files.append(write_stability(stability_file(job.part_dir, layer), equal_share_K, index_K))
    return UnitResult(ClusterFacts(float(np.max(linkage_Z[-1:, 2], initial=0.0))), files)
