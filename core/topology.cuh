// topology.cuh: who holds what: the ranks of a run as replicas (dp) of pipelines of stages (pp) of ranks that share layers (tp).
#pragma once
#include "collectives.cuh"

// tp ranks share each layer, pp stages the layers, and dp such groups the batch. Rank = (replica·pp + stage)·tp + tp_rank.
struct RankLayout {
    int dp = 1, pp = 1, tp = 1;
    int replica = 0, stage = 0, tp_rank = 0;
};
