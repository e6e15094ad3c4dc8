// The attention's kernels for AVX2 with FMA: 16 registers of 8 floats.
namespace {
constexpr int kVectorBytes = 32, kTileRows = 4, kTileVectors = 3;
}

#include "attention_unit.h"

const convit_kernels::AttentionKernels convit_kernels::kAttentionAvx2 = convit_kernels::attention_kernels();
