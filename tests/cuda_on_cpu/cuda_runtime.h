// CUDA on the CPU: what csrc/tables/cuda.cu takes from CUDA, for g++, to be found in place of CUDA's own header.
//
// A CUDA thread is a thread here, so that ThreadSanitizer sees a missing __syncthreads(). Shared memory is allocated,
// so that AddressSanitizer sees where it ends, and is NaN before it is written. What is no C++, launches and
// declarations of shared memory, __init__.py rewrites on the way into the compiler.
#pragma once

#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// Before the macros below, which are not meant for torch's headers.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

struct Index {
  unsigned int x;
};
inline thread_local Index threadIdx, blockIdx;

using cudaStream_t = void*;

namespace cuda_on_cpu {

// Threads that run blocks, one block after another.
class Team {
 public:
  Team(unsigned int threads, size_t dynamic_bytes)
      : dynamic_bytes_(dynamic_bytes), lines_(threads), barrier_(threads, OnArrival{this}) {}

  // Returns when all threads of the block are at the same line; 0 is the kernel's end.
  void wait(int line) {
    lines_[threadIdx.x] = line;
    barrier_.arrive_and_wait();
  }

  // The block's array that is declared at a line.
  void* shared(int line, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<unsigned char[]>& memory = shared_[line];
    if (memory == nullptr) {
      memory.reset(new unsigned char[bytes]);
      std::memset(memory.get(), 0xff, bytes);
    }
    return memory.get();
  }
  void* dynamic_shared(int line) { return shared(line, dynamic_bytes_); }

 private:
  struct OnArrival {
    Team* team;
    void operator()() const noexcept { team->all_arrived(); }
  };

  void all_arrived() {
    for (const int line : lines_) {
      if (line != lines_[0]) {
        std::fprintf(stderr, "cuda_on_cpu: threads of one block wait at lines %d and %d\n", lines_[0], line);
        std::abort();
      }
    }
    if (lines_[0] == 0) {
      shared_.clear();
    }
  }

  const size_t dynamic_bytes_;
  std::vector<int> lines_;
  std::mutex mutex_;
  std::map<int, std::unique_ptr<unsigned char[]>> shared_;
  std::barrier<OnArrival> barrier_;
};

inline thread_local Team* team = nullptr;

// Two teams at once, one upwards through the even blocks, the other downwards through the odd ones: no block may count
// on another.
template <typename... P, typename... A>
void launch(
    void (*kernel)(P...), unsigned int blocks, unsigned int threads, size_t dynamic_bytes, cudaStream_t,
    A... arguments) {
  STD_TORCH_CHECK(
      blocks > 0 && blocks < 1u << 31 && threads > 0 && threads <= 1024 && dynamic_bytes <= 48 * 1024,
      "cuda_on_cpu: CUDA launches no ", blocks, " blocks of ", threads, " threads with ", dynamic_bytes,
      " bytes of shared memory");
  Team teams[] = {{threads, dynamic_bytes}, {threads, dynamic_bytes}};
  std::vector<std::thread> pool;
  for (unsigned int parity = 0; parity < 2 && parity < blocks; ++parity) {
    const unsigned int count = (blocks - parity + 1) / 2;
    for (unsigned int thread = 0; thread < threads; ++thread) {
      pool.emplace_back([&, parity, count, thread] {
        team = &teams[parity];
        threadIdx.x = thread;
        for (unsigned int index = 0; index < count; ++index) {
          blockIdx.x = 2 * (parity == 0 ? index : count - 1 - index) + parity;
          kernel(arguments...);
          team->wait(0);
        }
      });
    }
  }
  for (std::thread& thread : pool) {
    thread.join();
  }
}

// The ops take tensors of the CPU, for which they are registered, too, and there is neither a stream nor a device.
inline AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

}  // namespace cuda_on_cpu

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int32_t) {}
};
}  // namespace torch::stable::accelerator

#define __global__
#define __syncthreads() cuda_on_cpu::team->wait(__LINE__)
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
#define aoti_torch_get_current_cuda_stream cuda_on_cpu::no_stream
#define DeviceGuard NoGuard
#define is_cuda is_cpu
#define CUDA CPU
