// The attention's kernels for bfloat16 with AVX-512's dot products of bfloat16 pairs.
#define CONVIT_VECTOR_BYTES 64
#define CONVIT_TILE_ROWS 8
#define CONVIT_TILE_VECTORS 3
#include "unit/unit.h"

const convit_kernels::Unit CONVIT_UNIT(kAvx512Bf16) = {
    CONVIT_UNIT_NAME("avx512_bf16"), &CONVIT_UNIT(kAvx512), {{}, {}, dtype_kernels<float, BFloat16, Pairs>(), {}}};
