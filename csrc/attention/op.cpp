// The attention's ops on the CPU: checks, choice of the instruction set, and division of the work among threads.
#include "problem.h"
#include "units.h"
#include "../op_namespace.h"

#include <torch/csrc/stable/macros.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <unistd.h>
#endif

namespace convit_kernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_parameter(const Tensor& t, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be float64 where q is, and float32 else");
}

void check_like(const Tensor& t, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.scalar_type() == q.scalar_type(), name, " must have q's dtype");
  STD_TORCH_CHECK(t.dim() == 4, name, " must have shape (batch, heads, tokens, head_dim)");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(t.size(dim) == q.size(dim), name, " must have q's shape");
  }
}

ScalarType computed_in(const Tensor& q) {
  return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_inputs(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight, const Tensor& gate, int64_t height,
    int64_t width, double dropout_p) {
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
          dtype == ScalarType::Half,
      "q must be float16, bfloat16, float32 or float64");
  check_like(q, q, "q");
  check_like(k, q, "k");
  check_like(v, q, "v");
  const int64_t heads = q.size(1), tokens = q.size(2), head_dim = q.size(3);
  STD_TORCH_CHECK(heads > 0 && head_dim > 0, "q must have at least one head and one channel a head");
  // so that no product of sizes below leaves 64 bits
  STD_TORCH_CHECK(
      tokens <= int64_t{1} << 31 && head_dim <= int64_t{1} << 16, "at most 2^31 tokens and 2^16 channels a head");
  STD_TORCH_CHECK(height > 0 && width > 0 && height <= tokens && width <= tokens, "the grid must have tokens");
  STD_TORCH_CHECK(height * width == tokens, "height * width must be the number of tokens");
  check_parameter(pos_weight, "pos_weight", computed_in(q));
  check_parameter(gate, "gate", computed_in(q));
  STD_TORCH_CHECK(
      pos_weight.dim() == 2 && pos_weight.size(0) == heads && pos_weight.size(1) == 3,
      "pos_weight must have shape (heads, 3)");
  STD_TORCH_CHECK(gate.dim() == 1 && gate.size(0) == heads, "gate must have shape (heads,)");
  STD_TORCH_CHECK(dropout_p == 0, "the CPU kernels have no dropout");
}

// Channels adjacent: copied only where they are not.
Tensor with_adjacent_channels(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

Strided strided(const Tensor& t) {
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2)};
}

// As the output projection reads it: (images, tokens, heads, head_dim) in memory.
Tensor empty_heads_last(const Tensor& q) {
  return torch::stable::transpose(torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1), q.size(3)}), 1, 2);
}

// The parameters in one piece and the gate's sigmoid, in what is computed in.
template <typename T>
std::vector<T> parameters(const Tensor& pos_weight, const Tensor& gate) {
  const int64_t heads = gate.size(0);
  const T* weights = static_cast<const T*>(pos_weight.const_data_ptr());
  const T* gates = static_cast<const T*>(gate.const_data_ptr());
  std::vector<T> values(4 * heads);
  for (int64_t head = 0; head < heads; ++head) {
    values[head] = static_cast<T>(1 / (1 + std::exp(-static_cast<double>(gates[head * gate.stride(0)]))));
    for (int64_t feature = 0; feature < 3; ++feature) {
      values[heads + 3 * head + feature] = weights[head * pos_weight.stride(0) + feature * pos_weight.stride(1)];
    }
  }
  return values;
}

const DtypeKernels& kernels_for(const Tensor& q) {
  const auto dtype = [&] {
    switch (q.scalar_type()) {
      case ScalarType::Double:
        return kFloat64;
      case ScalarType::BFloat16:
        return kBFloat16;
      case ScalarType::Half:
        return kFloat16;
      default:
        return kFloat32;
    }
  }();
  return unit_for(unit(), dtype).kernels[dtype];
}

// Bytes of a core's second-level cache: what CONVIT_KERNELS_L2 says, read at each call, else the system.
int64_t cache_bytes() {
  if (const char* wish = std::getenv("CONVIT_KERNELS_L2"); wish != nullptr && *wish != '\0') {
    char* end = nullptr;
    const long long bytes = std::strtoll(wish, &end, 10);
    STD_TORCH_CHECK(
        *end == '\0' && bytes > 0, "CONVIT_KERNELS_L2=", wish, ": give the bytes of a core's second-level cache");
    return bytes;
  }
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  return found > 0 ? found : int64_t{1} << 20;
}

// Memory of one thread.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : data_(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* get() const { return data_; }

 private:
  void* data_;
};

// Blocks of queries that a thread takes at least: below that, it costs more to wake than it computes.
int64_t grain(const Problem& p, int64_t blocks) {
  const int64_t products = 2 * p.height * p.width * p.head_dim * (p.height * p.width / blocks + 1);
  return std::max<int64_t>(1, 500'000 / products);
}

template <typename T>
void run_forward(const ForwardKernel& kernel, Forward& p, const Tensor& pos_weight, const Tensor& gate) {
  const std::vector<T> values = parameters<T>(pos_weight, gate);
  p.gate = values.data();
  p.pos_weight = values.data() + p.heads;
  const Plan plan = kernel.plan(p);
  torch::stable::parallel_for(0, p.images * p.heads * plan.blocks, grain(p, plan.blocks), [&](int64_t at, int64_t end) {
    const Scratch scratch(plan.bytes);
    while (at < end) {  // the keys and values of one image and head are prepared once for all of its blocks
      const int64_t block = at % plan.blocks, stop = std::min(plan.blocks, block + end - at);
      kernel.run(p, at / plan.blocks, block, stop, scratch.get());
      at += stop - block;
    }
  });
}

void fill_problem(
    Problem& p, const Tensor& q, const Tensor& k, const Tensor& v, int64_t height, int64_t width, double scale) {
  p.images = q.size(0);
  p.heads = q.size(1);
  p.height = height;
  p.width = width;
  p.head_dim = q.size(3);
  p.scale = scale;
  p.cache = cache_bytes();
  p.q = strided(q);
  p.k = strided(k);
  p.v = strided(v);
}

std::tuple<Tensor, Tensor, Tensor> gated_attention(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& pos_weight, const Tensor& gate, int64_t height,
    int64_t width, double scale, double dropout_p, std::optional<Tensor> philox, bool need_grad) {
  check_inputs(q, k, v, pos_weight, gate, height, width, dropout_p);
  const Tensor queries = with_adjacent_channels(q), keys = with_adjacent_channels(k),
               values = with_adjacent_channels(v);
  Tensor out = empty_heads_last(q);
  Tensor lse = need_grad ? torch::stable::new_empty(pos_weight, {q.size(0), q.size(1), q.size(2)})
                         : torch::stable::new_empty(pos_weight, {0});
  Tensor content = torch::stable::new_empty(q, {0});

  Forward p;
  fill_problem(p, queries, keys, values, height, width, scale);
  p.out = strided(out);
  p.lse = need_grad ? lse.mutable_data_ptr() : nullptr;
  const ForwardKernel& kernel = kernels_for(q).forward;
  if (computed_in(q) == ScalarType::Double) {
    run_forward<double>(kernel, p, pos_weight, gate);
  } else {
    run_forward<float>(kernel, p, pos_weight, gate);
  }
  return {out, lse, content};
}

// Pieces of an image and head that have accumulators of their own. The problem alone decides, never the number of
// threads: sums have the same order, and so the same bits, on any number of them.
int64_t pieces(const Problem& p, int64_t blocks) {
  const int64_t image_heads = std::max<int64_t>(1, p.images * p.heads);
  return std::min(blocks, (kPieces + image_heads - 1) / image_heads);
}

template <typename T>
void run_backward(
    const BackwardKernel& kernel, Backward& p, const Tensor& pos_weight, const Tensor& gate, Tensor& d_pos_weight,
    Tensor& d_gate) {
  const std::vector<T> values = parameters<T>(pos_weight, gate);
  p.gate = values.data();
  p.pos_weight = values.data() + p.heads;
  const Plan plan = kernel.plan(p);
  const int64_t image_heads = p.images * p.heads, parts = pieces(p, plan.blocks), bytes = kernel.accumulator_bytes(p);
  std::vector<ScalarGradients> sums(image_heads * parts);
  const Scratch shared(parts > 1 ? image_heads * parts * bytes : 0);
  char* accumulators = static_cast<char*>(shared.get());
  torch::stable::parallel_for(0, image_heads * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(plan.bytes + (parts > 1 ? 0 : bytes));
    for (int64_t at = begin; at < end; ++at) {
      const int64_t image_head = at / parts, part = at % parts;
      void* accumulator = parts > 1 ? accumulators + at * bytes : static_cast<char*>(scratch.get()) + plan.bytes;
      kernel.run(
          p, image_head, part * plan.blocks / parts, (part + 1) * plan.blocks / parts, accumulator, &sums[at],
          scratch.get());
      if (parts == 1) {
        kernel.finish(p, image_head, accumulator, 1);
      }
    }
  });
  if (parts > 1) {
    torch::stable::parallel_for(0, image_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t image_head = begin; image_head < end; ++image_head) {
        kernel.finish(p, image_head, accumulators + image_head * parts * bytes, parts);
      }
    });
  }
  T* weights = static_cast<T*>(d_pos_weight.mutable_data_ptr());
  T* gates = static_cast<T*>(d_gate.mutable_data_ptr());
  for (int64_t head = 0; head < p.heads; ++head) {
    ScalarGradients total = {};
    for (int64_t image = 0; image < p.images; ++image) {
      for (int64_t part = 0; part < parts; ++part) {
        const ScalarGradients& sum = sums[(image * p.heads + head) * parts + part];
        for (int feature = 0; feature < 3; ++feature) {
          total.pos_weight[feature] += sum.pos_weight[feature];
        }
        total.gate += sum.gate;
      }
    }
    for (int feature = 0; feature < 3; ++feature) {
      weights[head * d_pos_weight.stride(0) + feature * d_pos_weight.stride(1)] =
          static_cast<T>(total.pos_weight[feature]);
    }
    gates[head * d_gate.stride(0)] = static_cast<T>(total.gate);
  }
}

// content and lse are what other devices' backward reads; here the scores are computed anew, and all follows from them.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_attention_backward(
    const Tensor& d_out, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& content, const Tensor& lse,
    const Tensor& pos_weight, const Tensor& gate, int64_t height, int64_t width, double scale, double dropout_p,
    std::optional<Tensor> philox) {
  check_inputs(q, k, v, pos_weight, gate, height, width, dropout_p);
  check_like(d_out, q, "d_out");
  const Tensor queries = with_adjacent_channels(q), keys = with_adjacent_channels(k),
               values = with_adjacent_channels(v);
  const Tensor d_outs = with_adjacent_channels(d_out);
  Tensor dq = empty_heads_last(q), dk = empty_heads_last(q), dv = empty_heads_last(q);
  Tensor d_pos_weight = torch::stable::empty_like(pos_weight), d_gate = torch::stable::empty_like(gate);

  Backward p;
  fill_problem(p, queries, keys, values, height, width, scale);
  p.d_out = strided(d_outs);
  p.dq = strided(dq);
  p.dk = strided(dk);
  p.dv = strided(dv);
  const BackwardKernel& kernel = kernels_for(q).backward;
  if (computed_in(q) == ScalarType::Double) {
    run_backward<double>(kernel, p, pos_weight, gate, d_pos_weight, d_gate);
  } else {
    run_backward<float>(kernel, p, pos_weight, gate, d_pos_weight, d_gate);
  }
  return {dq, dk, dv, d_pos_weight, d_gate};
}

}  // namespace

CONVIT_KERNELS_IMPL(CPU, m) {
  // In Triton's interpreter the Triton kernels run on CPU tensors, and ops.py registers them instead.
  const char* interpreted = std::getenv("TRITON_INTERPRET");
  if (interpreted == nullptr || std::strcmp(interpreted, "1") != 0) {
    m.impl("gated_attention", TORCH_BOX(&gated_attention));
    m.impl("gated_attention_backward", TORCH_BOX(&gated_attention_backward));
  }
}

}  // namespace convit_kernels
