// The attention's kernels for AVX2 with FMA: 16 registers of 8 floats.
#define CONVIT_VECTOR_BYTES 32
#define CONVIT_TILE_ROWS 4
#define CONVIT_TILE_VECTORS 3
#include "unit/unit.h"

const convit_kernels::Unit convit_kernels::kAvx2 = convit_kernels::complete_unit("avx2");
