// The eight tiles of AMX, by the processor's instructions or in software.
//
// The instructions are written here and not taken from the compiler's header: in GCC 12 its loads do not tell that they
// read memory, so that stores to it may be moved behind them.
#pragma once

#include "formats.h"

namespace convit_kernels {
namespace {

constexpr int kTileSide = 16;  // rows of a tile, and elements of 4 bytes in a row

#ifndef CONVIT_SOFTWARE_TILES

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "what ldtilecfg reads");

// While it lives all tiles are whole; then they are configured as the caller had them: others remember what they set.
class TileSession {
 public:
  TileSession() {
    TileConfig whole;
    whole.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      whole.row_bytes[tile] = 4 * kTileSide;
      whole.rows[tile] = kTileSide;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(before_));
    __asm__ volatile("ldtilecfg %0" : : "m"(whole));
  }
  ~TileSession() { __asm__ volatile("ldtilecfg %0" : : "m"(before_)); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;

 private:
  TileConfig before_;
};

template <int kTile>
CONVIT_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Rows are `stride` elements of 4 bytes apart.
template <int kTile>
CONVIT_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(4 * stride), "i"(kTile) : "memory");
}

template <int kTile>
CONVIT_INLINE void store_tile(float* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(4 * stride), "i"(kTile) : "memory");
}

// sum (16, 16) += left (16, 16 pairs) right (16 pairs, 16), each a number of the tile.
template <int kSum, int kLeft, int kRight>
CONVIT_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kLeft), "i"(kRight));
}

#else

struct TileSession {
  TileSession() {}  // not a trivial type: an unused variable of it is no mistake
};

thread_local uint32_t tiles[8][kTileSide][kTileSide];

template <int kTile>
void zero_tile() {
  __builtin_memset(tiles[kTile], 0, sizeof(tiles[kTile]));
}

template <int kTile>
void load_tile(const void* from, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row) {
    __builtin_memcpy(tiles[kTile][row], static_cast<const uint32_t*>(from) + row * stride, sizeof(tiles[kTile][row]));
  }
}

template <int kTile>
void store_tile(float* to, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row) {
    __builtin_memcpy(to + row * stride, tiles[kTile][row], sizeof(tiles[kTile][row]));
  }
}

// The number of these bits; one that is subnormal counts as zero.
inline float tile_number(uint32_t bits) {
  return float_of(bits & ((bits & 0x7f800000) == 0 ? 0x80000000 : 0xffffffff));
}

// As Intel's manual describes TDPBF16PS: the products of the even and of the odd numbers are added up apart, from zero,
// by fused multiply-adds, and their sum is added to the tile's; subnormal numbers are zero, in and out.
template <int kSum, int kLeft, int kRight>
void multiply_tiles() {
  const FlushSubnormals flush;
  float right_even[kTileSide][kTileSide], right_odd[kTileSide][kTileSide];
  for (int at = 0; at < kTileSide * kTileSide; ++at) {
    const uint32_t right = tiles[kRight][at / kTileSide][at % kTileSide];
    right_even[at / kTileSide][at % kTileSide] = tile_number(right << 16);
    right_odd[at / kTileSide][at % kTileSide] = tile_number(right & 0xffff0000);
  }
  for (int row = 0; row < kTileSide; ++row) {
    float even[kTileSide] = {}, odd[kTileSide] = {};
    for (int pair = 0; pair < kTileSide; ++pair) {
      const uint32_t left = tiles[kLeft][row][pair];
      const float left_even = tile_number(left << 16), left_odd = tile_number(left & 0xffff0000);
      for (int column = 0; column < kTileSide; ++column) {
        even[column] = __builtin_fmaf(left_even, right_even[pair][column], even[column]);
        odd[column] = __builtin_fmaf(left_odd, right_odd[pair][column], odd[column]);
      }
    }
    for (int column = 0; column < kTileSide; ++column) {
      const float sum = tile_number(tiles[kSum][row][column]) + (even[column] + odd[column]);
      __builtin_memcpy(&tiles[kSum][row][column], &sum, sizeof(sum));
    }
  }
}

#endif

}  // namespace
}  // namespace convit_kernels
