// The Python module of a build for a kernel hub. The ops' kernels register themselves, and Python defines their schemas.
#ifdef CPU_KERNEL
#include "../csrc/module_cpu.cpp"
#else
#include "../csrc/module_cuda.cpp"
#endif
