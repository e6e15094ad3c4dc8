// The attention's kernels for bfloat16 with AVX-512's dot products of bfloat16 pairs.
#define CONVIT_VECTOR_BYTES 64
#define CONVIT_TILE_ROWS 8
#define CONVIT_TILE_VECTORS 3
#include "unit/unit.h"

const convit_kernels::DtypeKernels convit_kernels::kBFloat16Avx512 =
    convit_kernels::dtype_kernels<float, convit_kernels::BFloat16, convit_kernels::Pairs>();
