"""Units of recombine: the steps in which a layer is solved, and a token shard's way through it.

For each layer, on all workers: the source's stream passes it (source), the student's without its experts (gather), and pairs
are compared where they are chosen anew (compare). On one: pairs are matched, router rows fitted (start). On all: every slot
chooses its neurons (choose). On one: W_down is solved (solve), while others send the source's stream through the next layer.
On all: the student's stream goes on (advance).
"""
