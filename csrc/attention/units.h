// The units of the attention's kernels, one for each instruction set, and the one in use.
#pragma once

#include <vector>

#include "problem.h"

namespace convit_kernels {

// Those that this processor runs, the fastest first, and after all of them emulated ones.
const std::vector<const Unit*>& units();

// The fastest, or the one that the environment variable CONVIT_KERNELS_ISA names, read at each call. Throws
// std::runtime_error for a name that is not among the above.
const Unit& unit();

// The unit that has a dtype's kernels: this one, or the first of its bases that does.
const Unit& unit_for(const Unit& unit, Dtype dtype);

}  // namespace convit_kernels
