#include "instruction_set.h"

#include <cstdlib>
#include <stdexcept>

namespace convit_kernels {

const std::vector<InstructionSet>& instruction_sets() {
  static const std::vector<InstructionSet> sets = [] {
    std::vector<InstructionSet> found;
#ifdef CONVIT_KERNELS_X86
    // these ask the operating system too whether it saves the wide registers
    __builtin_cpu_init();
#ifdef CONVIT_KERNELS_EMULATE
    const bool avx512 = true, bf16 = true;
#else
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    if (bf16) {
      static AttentionKernels with_dot_products = kAttentionAvx512;
      with_dot_products.bfloat16 = kBFloat16Avx512;
      found.push_back({"avx512_bf16", &with_dot_products});
    }
    if (avx512) {
      found.push_back({"avx512", &kAttentionAvx512});
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back({"avx2", &kAttentionAvx2});
    }
#endif
    found.push_back({"portable", &kAttentionPortable});
    return found;
  }();
  return sets;
}

const InstructionSet& instruction_set() {
  const std::vector<InstructionSet>& sets = instruction_sets();
  const char* wish = std::getenv("CONVIT_KERNELS_ISA");
  if (wish == nullptr || *wish == '\0') {
    return sets.front();
  }
  std::string allowed;
  for (const InstructionSet& set : sets) {
    if (wish == std::string(set.name)) {
      return set;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error(
      "CONVIT_KERNELS_ISA=" + std::string(wish) + ": this build has for this processor only " + allowed);
}

}  // namespace convit_kernels
