// The attention's kernels for any processor: vectors of 16 bytes, which compilers have for x86-64 (SSE2) and Arm
// (NEON).
#define CONVIT_VECTOR_BYTES 16
#define CONVIT_TILE_ROWS 4
#define CONVIT_TILE_VECTORS 2
#include "unit/unit.h"

const convit_kernels::Unit convit_kernels::kPortable = convit_kernels::complete_unit("portable");
