// The attention's kernels for AVX-512: 32 registers of 16 floats.
#define CONVIT_VECTOR_BYTES 64
#define CONVIT_TILE_ROWS 8
#define CONVIT_TILE_VECTORS 3
#include "unit/unit.h"

const convit_kernels::AttentionKernels convit_kernels::kAttentionAvx512 = convit_kernels::attention_kernels();
