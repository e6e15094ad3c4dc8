// The instruction sets that the attention's kernels are compiled for, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "problem.h"

namespace convit_kernels {

struct InstructionSet {
  const char* name;
  const AttentionKernels* kernels;
};

// Those that this processor runs, the fastest first.
const std::vector<InstructionSet>& instruction_sets();

// The fastest, or the one that the environment variable CONVIT_KERNELS_ISA names, read at each call. Throws
// std::runtime_error for a name that is not among the above.
const InstructionSet& instruction_set();

}  // namespace convit_kernels
