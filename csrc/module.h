// What makes a shared library importable as a Python module. Kernels register themselves with torch when it is loaded.
#pragma once

#include <Python.h>

// A build for a kernel hub names its one library itself, and keeps it beside the Python that it was built with.
#ifdef TORCH_EXTENSION_NAME
#define CONVIT_KERNELS_MODULE(name) TORCH_EXTENSION_NAME
#define CONVIT_KERNELS_INTERFACE "of the same build"
#else
#define CONVIT_KERNELS_MODULE(name) name
#endif

#define CONVIT_KERNELS_DEFINE_MODULE(name, methods) \
  CONVIT_KERNELS_DEFINE_MODULE_AS(CONVIT_KERNELS_MODULE(name), methods)
#define CONVIT_KERNELS_DEFINE_MODULE_AS(name, methods) CONVIT_KERNELS_DEFINE_EXPANDED(name, methods)
// The Python side reads the first line in the file before it loads it: a library built for other op schemas is refused.
#define CONVIT_KERNELS_DEFINE_EXPANDED(name, methods)                                            \
  extern "C" __attribute__((used)) const char convit_kernels_interface[] =                       \
      "convit_kernels interface " CONVIT_KERNELS_INTERFACE;                                      \
  PyMODINIT_FUNC PyInit_##name(void) {                                                           \
    static PyModuleDef definition = {                                                            \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                         \
  }
