// The attention's kernels for AVX-512: 32 registers of 16 floats.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 3;
}

#include "attention_unit.h"

const convit_kernels::AttentionKernels convit_kernels::kAttentionAvx512 = convit_kernels::attention_kernels();
