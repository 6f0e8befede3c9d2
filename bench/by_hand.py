"""What a user would write by hand: the whole model in memory, every expert on every token, cluster, average, save.

It is the yardstick of `bench.run`, so it is written with care for time but without the tricks that the pipeline uses. It
makes the same checkpoint as a `stock` export: the experts of a cluster and their router rows, averaged by usage.

Dimensions: T tokens, D hidden size, F intermediate size, E experts, K clusters, k experts a token.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM


class Watcher:
    """Sums the outputs of every expert over all tokens that enter a MoE block, and counts those routed to it."""

    def __init__(self, experts: Any) -> None:
        self.experts = experts
        self.num_tokens = 0
        self.output_sum_ED = torch.zeros(experts.num_experts, experts.down_proj.shape[1], dtype=torch.float64)
        self.num_routed_E = torch.zeros(experts.num_experts, dtype=torch.float64)

    def watch(self, _module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        """Before the experts' own forward."""
        x_TD, index_Tk, _ = args
        self.num_tokens += len(x_TD)
        self.num_routed_E += torch.bincount(index_Tk.flatten(), minlength=len(self.num_routed_E))
        for expert in range(self.experts.num_experts):
            gate_TF, up_TF = functional.linear(x_TD, self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            output_TD = functional.linear(self.experts.act_fn(gate_TF) * up_TF, self.experts.down_proj[expert])
            self.output_sum_ED[expert] += output_TD.sum(0, dtype=torch.float32).double()


def average(weight: Tensor, labels_E: np.ndarray, share_E: Tensor) -> Tensor:
    """Average [E, ...] to [K, ...], weighted by use within each cluster."""
    merged = []
    for cluster in range(labels_E.max() + 1):
        members = np.flatnonzero(labels_E == cluster)
        share = share_E[members] / share_E[members].sum()
        merged.append(sum(weight[m].float() * s for m, s in zip(members, share.tolist(), strict=True)).to(weight.dtype))
    return torch.stack(merged)


def canonical(labels_E: np.ndarray) -> np.ndarray:
    """Clusters numbered by their smallest member."""
    order = {label: number for number, label in enumerate(dict.fromkeys(labels_E.tolist()))}
    return np.array([order[label] for label in labels_E.tolist()])


def main() -> None:
    """Calibrate, cluster, merge and save; labels go to `labels.json`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--num-experts", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True, help="sequences")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, local_files_only=True).eval()
    watchers, hooks = [], []
    for layer in model.model.layers:
        watchers.append(Watcher(layer.mlp.experts))
        hooks.append(layer.mlp.experts.register_forward_pre_hook(watchers[-1].watch))
    with torch.inference_mode():
        for ids in torch.from_numpy(np.load(args.ids)).split(args.micro_batch):
            model.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    all_labels = []
    for layer, watcher in zip(model.model.layers, watchers, strict=True):
        features = (watcher.output_sum_ED / watcher.num_tokens).numpy()
        labels_E = canonical(fcluster(linkage(features, "average"), args.num_experts, "maxclust"))
        all_labels.append(labels_E.tolist())
        experts, gate = layer.mlp.experts, layer.mlp.gate
        with torch.no_grad():
            for owner, name in ((experts, "gate_up_proj"), (experts, "down_proj"), (gate, "weight")):
                merged = average(getattr(owner, name), labels_E, watcher.num_routed_E)
                setattr(owner, name, torch.nn.Parameter(merged, requires_grad=False))
        experts.num_experts = gate.num_experts = args.num_experts
    model.config.num_local_experts = args.num_experts
    if hasattr(model.config, "num_experts"):
        model.config.num_experts = args.num_experts
    model.save_pretrained(args.output)
    (args.output / "labels.json").write_text(json.dumps(all_labels))


if __name__ == "__main__":
    main()
