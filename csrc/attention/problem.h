// What the attention's binding and its units for one instruction set each know of one another: raw pointers and sizes.
//
// A unit is compiled with its own instruction set's flags. Nothing that it compiles may be shared with the rest of the
// library, or the linker could keep the copy that only some processors can run: no torch headers, no library templates.
#pragma once

#include <cstdint>

namespace convit_kernels {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

// A (image, head, token, channel) tensor: strides in elements; channels are adjacent.
struct Strided {
  void* data;
  int64_t image, head, token;
};

// "T" is what is computed in: double for float64 tensors, else float.
struct Problem {
  int64_t images, heads, height, width, head_dim;
  int64_t cache;  // bytes of a core's second-level cache, which blocks are cut for
  double scale;
  const void* gate;        // (heads,) T, after the sigmoid
  const void* pos_weight;  // (heads, 3) T
  Strided q, k, v;
};

struct Forward : Problem {
  Strided out;
  void* lse;  // (images, heads, tokens) T, or null
};

struct Backward : Problem {
  Strided d_out, dq, dk, dv;
};

// Sums over some queries of one image and head.
struct ScalarGradients {
  double pos_weight[3], gate;
};

// So many pieces of work keep all threads busy; fewer images and heads than that are cut further.
constexpr int64_t kPieces = 32;

// How a problem is cut into blocks of queries, and the memory one thread needs for it.
struct Plan {
  int64_t blocks, bytes;
};

// `memory` is the thread's own, aligned to 64 bytes.
struct ForwardKernel {
  Plan (*plan)(const Problem&);
  void (*run)(const Forward&, int64_t image_head, int64_t block_begin, int64_t block_end, void* memory);
};

// dk and dv are first accumulated in T, `accumulator_bytes` for one image and head; `finish` adds several of them up
// into the first, in order, and writes the result.
struct BackwardKernel {
  Plan (*plan)(const Problem&);
  int64_t (*accumulator_bytes)(const Problem&);
  void (*run)(
      const Backward&, int64_t image_head, int64_t block_begin, int64_t block_end, void* accumulator,
      ScalarGradients* sums, void* memory);
  void (*finish)(const Backward&, int64_t image_head, void* accumulators, int64_t count);
};

struct DtypeKernels {
  ForwardKernel forward;
  BackwardKernel backward;
};

enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kDtypes };

// What is compiled for one instruction set: only what it does better than its base, which has the rest.
struct Unit {
  const char* name;
  const Unit* base;
  DtypeKernels kernels[kDtypes];  // those that it leaves to its base are null
  bool (*works)() = nullptr;      // a test of what processors and virtual machines may only claim to have
};

#ifdef CONVIT_KERNELS_X86
extern const Unit kAmxBf16, kAvx512Bf16, kAvx512, kAvx2;
#endif
#ifdef CONVIT_KERNELS_EMULATE
extern const Unit kAmxBf16Emulated, kAvx512Bf16Emulated, kAvx512Emulated;
#endif
extern const Unit kPortable;

}  // namespace convit_kernels
