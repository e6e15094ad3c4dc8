// The attention's kernels for any processor: vectors of 16 bytes, which compilers have for x86-64 (SSE2) and Arm (NEON).
namespace {
constexpr int kVectorBytes = 16, kTileRows = 4, kTileVectors = 2;
}

#include "attention_unit.h"

const convit_kernels::AttentionKernels convit_kernels::kAttentionPortable = convit_kernels::attention_kernels();
