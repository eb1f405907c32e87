// The description of a beam step's logits, for the CPU and for CUDA devices.
#pragma once

namespace gflowgr {

// The tokens over which a beam's probabilities sum to 1: all, those of its depth's codebook, or its node's children.
enum class Normalize : int { vocab, level, children };

// Where the logits of a beam are: element t belongs to token t; to the t-th token of the codebook of the beam's
// depth; to the t-th child of its node.
enum class LogitLayout : int { vocabulary, codebook, children };

}  // namespace gflowgr
