// The namespace that the ops' kernels are registered in: the package's, or that of a build for a kernel hub.
#pragma once

#include <torch/csrc/stable/macros.h>

#include <torch/csrc/stable/library.h>

#ifndef CONVIT_KERNELS_NAMESPACE
#ifndef TORCH_EXTENSION_NAME
#error "the build gives CONVIT_KERNELS_NAMESPACE, from schemas.py; or TORCH_EXTENSION_NAME, as kernel-builder does"
#endif
#define CONVIT_KERNELS_NAMESPACE TORCH_EXTENSION_NAME
#endif

// torch's macro pastes the namespace into names: it has to be expanded before.
#define CONVIT_KERNELS_IMPL(key, library) CONVIT_KERNELS_IMPL_IN(CONVIT_KERNELS_NAMESPACE, key, library)
#define CONVIT_KERNELS_IMPL_IN(space, key, library) STABLE_TORCH_LIBRARY_IMPL(space, key, library)
