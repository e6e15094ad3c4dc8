// The attention's kernels for bfloat16 with AMX: products of 16 x 16 tiles, all else by AVX-512.
#define CONVIT_VECTOR_BYTES 64
#define CONVIT_TILE_ROWS 8
#define CONVIT_TILE_VECTORS 2
#ifdef CONVIT_EMULATED
#define CONVIT_SOFTWARE_TILES
#endif
#include "unit/unit.h"
// after it: vectors have their size
#include "unit/tile_operands.h"

const convit_kernels::Unit CONVIT_UNIT(kAmxBf16) = {
    CONVIT_UNIT_NAME("amx_bf16"),
    &CONVIT_UNIT(kAvx512Bf16),
    {{}, {}, dtype_kernels<float, BFloat16, Tiles>(), {}},
    tiles_work};
