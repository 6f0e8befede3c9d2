"""Unit of cluster: one layer."""

from stages.cluster.certainty import relative_standard_errors, stability
from stages.cluster.linkage import FEATURES, all_cuts, link
from stages.contracts.certainty import write_errors, write_stability
from stages.contracts.dendrogram import write_dendrogram, write_labels
from stages.contracts.evidence import read_evidence
from stages.contracts.paths import dendrogram_file, errors_file, labels_file, stability_file
from stages.contracts.units import Job, UnitResult


def cluster_unit(job: Job) -> UnitResult:
    """Write the dendrogram and all its cuts of one layer; under sampling also how certain they are.

    args: statistics_dir, layer, feature, distance, linkage, seed (of the halves that are compared).
    """
    args, layer = job.args, job.args["layer"]
    evidence = read_evidence(job.run_dir / args["statistics_dir"], layer)
    linkage_Z = link(FEATURES[args["feature"]](evidence), args["distance"], args["linkage"], f"layer {layer}")
    files = [
        write_dendrogram(dendrogram_file(job.stage_dir, layer), linkage_Z),
        write_labels(labels_file(job.stage_dir, layer), all_cuts(linkage_Z)),
    ]
    if evidence.groups is not None:
        errors_E = relative_standard_errors(evidence.groups)
        stable = stability(evidence, evidence.groups, linkage_Z, args, args["seed"])
        files.append(write_errors(errors_file(job.stage_dir, layer), errors_E))
        files.append(write_stability(stability_file(job.stage_dir, layer), stable))
    return UnitResult(tuple(files), facts={"largest_distance": float(linkage_Z[-1, 2])})
