// The attention's kernels for the CPU: one source for every instruction set. A unit defines the size of its vectors,
// CONVIT_VECTOR_BYTES, and of its register tiles, CONVIT_TILE_ROWS x CONVIT_TILE_VECTORS, and includes this file.
//
// Scores are kept with the keys as rows and a block of queries as columns. A vector then holds one key's scores for
// several queries, so that the softmax, its gradient and the positional part need no sum across a vector's lanes, and
// keys and values are read in rows, as they come.
#pragma once

#include "backward.h"
#include "forward.h"

// A unit's object and its name. Where CONVIT_EMULATED is defined the unit is compiled for processors that lack its
// instructions, and stands beside the real one.
#ifdef CONVIT_EMULATED
#define CONVIT_UNIT(object) convit_kernels::object##Emulated
#define CONVIT_UNIT_NAME(name) name "_emulated"
#else
#define CONVIT_UNIT(object) convit_kernels::object
#define CONVIT_UNIT_NAME(name) name
#endif

namespace convit_kernels {
namespace {

template <typename T, typename S, typename Operands = Numbers<T, S>>
constexpr DtypeKernels dtype_kernels() {
  return {
      {forward_plan<Operands>, forward<Operands, S>},
      {backward_plan<Operands>, accumulator_bytes<Operands>, backward<Operands, S>, backward_finish<Operands, S>}};
}

// Every dtype, by the unit's vectors.
template <typename = void>
constexpr Unit complete_unit(const char* name) {
  return {
      name,
      nullptr,
      {dtype_kernels<float, float>(), dtype_kernels<double, double>(), dtype_kernels<float, BFloat16>(),
       dtype_kernels<float, Half>()}};
}

}  // namespace
}  // namespace convit_kernels
