// What makes a shared library importable as a Python module. Kernels register themselves with torch when it is loaded.
#pragma once

#include <Python.h>

// The Python side reads this line in the file before it loads it: a library built for other op schemas is refused.
#define CONVIT_KERNELS_DEFINE_MODULE(name, methods)                                              \
  extern "C" __attribute__((used)) const char convit_kernels_interface[] =                       \
      "convit_kernels interface " CONVIT_KERNELS_INTERFACE;                                      \
  PyMODINIT_FUNC PyInit_##name(void) {                                                           \
    static PyModuleDef definition = {                                                            \
        PyModuleDef_HEAD_INIT, #name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr}; \
    return PyModule_Create(&definition);                                                         \
  }
