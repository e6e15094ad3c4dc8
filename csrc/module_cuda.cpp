#include "module.h"

CONVIT_KERNELS_DEFINE_MODULE(_C_cuda, nullptr)
