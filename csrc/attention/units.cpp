#include "units.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#ifdef CONVIT_KERNELS_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace convit_kernels {
namespace {

#ifdef CONVIT_KERNELS_X86
#ifdef __linux__
// Whether the processor has tiles of AMX with products of bfloat16, as they are used here, and this process may use
// them. The tiles' shape is asked too: virtual machines have advertised AMX and let it have none.
bool amx_bf16() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (1u << 22)) == 0 || (d & (1u << 24)) == 0) {
    return false;
  }
  if (!__get_cpuid_count(0x1d, 0, &a, &b, &c, &d) || a < 1 || !__get_cpuid_count(0x1d, 1, &a, &b, &c, &d)) {
    return false;
  }
  const unsigned tile_bytes = a >> 16, row_bytes = b & 0xffff, tiles = b >> 16, rows = c & 0xffff;
  if (tile_bytes != 1024 || row_bytes != 64 || tiles < 8 || rows != 16) {
    return false;
  }
  // Linux gives the tiles' 8 KiB to processes that ask for them (Documentation/arch/x86/xstate.rst)
  constexpr long get_permission = 0x1022, request_permission = 0x1023, tile_data = 18;
  unsigned long permitted = 0;
  syscall(SYS_arch_prctl, request_permission, tile_data);
  return syscall(SYS_arch_prctl, get_permission, &permitted) == 0 && (permitted >> tile_data & 1) != 0;
}
#else
bool amx_bf16() { return false; }  // other systems have no such permission to ask for
#endif
#endif

}  // namespace

const std::vector<const Unit*>& units() {
  static const std::vector<const Unit*> found = [] {
    std::vector<const Unit*> run_here;
#ifdef CONVIT_KERNELS_X86
    // these ask the operating system too whether it saves the wide registers
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    const auto add_if = [&](bool runs_here, const Unit& unit) {
      if (runs_here && (unit.works == nullptr || unit.works())) {
        run_here.push_back(&unit);
      }
    };
    add_if(bf16 && amx_bf16(), kAmxBf16);
    add_if(bf16, kAvx512Bf16);
    add_if(avx512, kAvx512);
    add_if(avx2, kAvx2);
#endif
    run_here.push_back(&kPortable);
#ifdef CONVIT_KERNELS_EMULATE
    add_if(avx2, kAmxBf16Emulated);  // last: only by name
    add_if(avx2, kAvx512Bf16Emulated);
    add_if(avx2, kAvx512Emulated);
#endif
    return run_here;
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
