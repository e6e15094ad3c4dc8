#include "units.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace convit_kernels {

const std::vector<const Unit*>& units() {
  static const std::vector<const Unit*> found = [] {
    std::vector<const Unit*> runs_here;
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
      runs_here.push_back(&kAvx512Bf16);
    }
    if (avx512) {
      runs_here.push_back(&kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      runs_here.push_back(&kAvx2);
    }
#endif
    runs_here.push_back(&kPortable);
    return runs_here;
  }();
  return found;
}

const Unit& unit() {
  const char* wish = std::getenv("CONVIT_KERNELS_ISA");
  if (wish == nullptr || *wish == '\0') {
    return *units().front();
  }
  std::string allowed;
  for (const Unit* unit : units()) {
    if (wish == std::string(unit->name)) {
      return *unit;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(unit->name);
  }
  throw std::runtime_error(
      "CONVIT_KERNELS_ISA=" + std::string(wish) + ": this build has for this processor only " + allowed);
}

const Unit& unit_for(const Unit& unit, Dtype dtype) {
  return unit.kernels[dtype].forward.run != nullptr ? unit : unit_for(*unit.base, dtype);
}

}  // namespace convit_kernels
