// The attention's kernels for AVX-512: 32 registers of 16 floats.
#define CONVIT_VECTOR_BYTES 64
#define CONVIT_TILE_ROWS 8
#define CONVIT_TILE_VECTORS 3
#include "unit/unit.h"

const convit_kernels::Unit CONVIT_UNIT(kAvx512) = convit_kernels::complete_unit(CONVIT_UNIT_NAME("avx512"));
