// What the GPU kernels use of CUDA, by name: each instruction stands here once, as PTX. Without nvcc the names mean the
// functions of testing/emulator, which run a block's threads one after another on the host: the tests execute the very
// source of the kernels. So kernels use nothing of CUDA but what this header (and hopper.h) declares.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_runtime.h>

#define ARD_DEVICE __device__ __forceinline__
#define ARD_HOST_DEVICE __host__ __device__ __forceinline__
// At most `threads` per block; `blocks` of them shall fit on a multiprocessor.
#define ARD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define ARD_GRID_CONSTANT __grid_constant__

namespace ard {

using Stream = cudaStream_t;

ARD_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ARD_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
ARD_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ARD_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
ARD_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }

// The block's dynamic shared memory, on a 1024-byte boundary.
ARD_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return memory;
}

ARD_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Barriers

ARD_DEVICE void sync_block() { __syncthreads(); }
ARD_DEVICE void sync_warp() { __syncwarp(); }

// Barrier `id` (1 to 15) of `threads` threads, a multiple of 32: wait for all, or only be counted.
ARD_DEVICE void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ARD_DEVICE void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Exchange among the 32 threads of a warp, all of which must call

ARD_DEVICE float shuffle_xor(float value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
ARD_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// The value, of which the compiler knows nothing: what depends on it is computed where it is used, not ahead of a loop,
// where it would wait in registers.
ARD_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Arithmetic

ARD_DEVICE float exp2_approx(float x) {  // 2 ulp; -inf gives 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ARD_DEVICE float log2_approx(float x) { return __log2f(x); }
ARD_DEVICE float rsqrt(float x) { return rsqrtf(x); }
ARD_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
ARD_HOST_DEVICE constexpr int min_int(int a, int b) { return a < b ? a : b; }

// 16 bytes of global or shared memory at once; the address is a multiple of 16

struct alignas(16) Words {
  uint32_t word[4];
};

ARD_DEVICE Words load_global(const void* from) {
  Words w;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
               : "l"(from)
               : "memory");
  return w;
}

// The same for data that this kernel reads once and never writes: it passes L1 by.
ARD_DEVICE Words load_global_once(const void* from) {
  Words w;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
      : "l"(from));
  return w;
}

ARD_DEVICE void store_global(void* to, const Words& w) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]),
               "r"(w.word[3])
               : "memory");
}

// 8 bytes at once; the address is a multiple of 8.
struct alignas(8) Words2 {
  uint32_t word[2];
};

ARD_DEVICE Words2 load_global2(const void* from) {
  Words2 w;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(w.word[0]), "=r"(w.word[1]) : "l"(from) : "memory");
  return w;
}

ARD_DEVICE void store_global(void* to, const Words2& w) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(w.word[0]), "r"(w.word[1]) : "memory");
}

// Shared memory through these, so that the emulator can count bank conflicts. T has 4, 8 or 16 bytes.
template <class T>
ARD_DEVICE T load_shared(const T* from) {
  return *from;
}

template <class T>
ARD_DEVICE void store_shared(T* to, const T& value) {
  *to = value;
}

// Asynchronous copies of 16 bytes, global to shared; zeros are written when not `here` (nothing is read then).
// A thread's copies since its last commit are one group; wait<n> leaves its n newest groups in flight.
ARD_DEVICE void cp_async(void* to, const void* from, bool here) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(here ? 16 : 0)
               : "memory");
}
ARD_DEVICE void cp_async_8(void* to, const void* from, bool here) {  // 8 bytes
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(here ? 8 : 0)
               : "memory");
}
// 4 bytes.
ARD_DEVICE void cp_async_4(void* to, const void* from, bool here) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(here ? 4 : 0)
               : "memory");
}
ARD_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
ARD_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Tensor cores of sm_80. Fragments as the PTX manual draws them ("Matrix fragments for mma.m16n8k16")

// Four 8x8 matrices of halves; thread 8 i + r gives the address of row r of matrix i and receives, as word i, elements
// 2 (lane % 4) and the next one of row lane / 4 of it (transposed: of column lane / 4).
ARD_DEVICE void ldmatrix(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
ARD_DEVICE void ldmatrix_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, fp32) += a (16x16, rows) b (16x8, columns)
template <class T>
ARD_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// The same with a (16x8) and b (8x8): k = 8.
template <class T>
ARD_DEVICE void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b);

struct bfloat16;
struct float16;

#define ARD_MMA(T, name)                                                                    \
  template <>                                                                               \
  ARD_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                     \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));           \
  }                                                                                         \
  template <>                                                                               \
  ARD_DEVICE void mma_k8<T>(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {          \
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32." name "." name                      \
                 ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"                 \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                           \
                 : "r"(a0), "r"(a1), "r"(b));                                               \
  }
ARD_MMA(bfloat16, "bf16")
ARD_MMA(float16, "f16")
#undef ARD_MMA

// Launch

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// The current device's context becomes the calling thread's: the runtime does so by itself, the driver does not.
inline void bind_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaSetDevice(device), "cudaSetDevice");
}

// Let `kKernel` have all the shared memory that a block of the current device may have; 48 KB are the default. A launch
// takes what it asks for; a limit of a smaller launch's size would refuse the next, larger one.
template <auto kKernel>
void allow_shared_memory() {
  static std::atomic<uint64_t> allowed{0};  // a bit for each of the first 64 devices
  int device = 0, most = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return;
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of a block");
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "shared memory");
  allowed.fetch_or(bit, std::memory_order_relaxed);
}

// Launch `kKernel` on `stream`'s device, which is the current one.
template <auto kKernel, class Params>
void launch(int64_t blocks, int64_t blocks_y, int threads, size_t shared_bytes, Stream stream, const Params& params) {
  if (shared_bytes > (48 << 10)) allow_shared_memory<kKernel>();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kKernel, params), "kernel launch");
}

}  // namespace ard

#endif
