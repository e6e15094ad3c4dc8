#include "module.h"

CONVIT_KERNELS_DEFINE_MODULE(_C_cuda, nullptr)

// What the kernels were compiled for, which the Python side reads in the file: other GPUs get none of them.
#ifdef CONVIT_KERNELS_ARCHITECTURES
extern "C" __attribute__((used)) const char convit_kernels_architectures[] =
    "convit_kernels architectures " CONVIT_KERNELS_ARCHITECTURES;
#endif
