"""Units of recombine: the steps in which a layer is solved, and a token shard's way through it.

For each layer, on all workers: token shards pass it (gather), and pairs are compared where they are chosen anew (compare). On
one: pairs are matched, router rows fitted (start). On all: every slot chooses its neurons (choose). On one: W_down is solved
(solve). On all: the student's stream goes on (advance).
"""
