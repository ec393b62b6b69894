// What the Hopper kernels (sm_90a) use beyond gpu.h: barriers in shared memory that count bytes, tensor maps and the
// copy engine (TMA), registers moved between warpgroups, the warpgroup's matrix instruction (wgmma). Without nvcc the
// names mean the functions of testing/emulator/hopper_emulator.h.
//
// A warpgroup is four warps, the first a multiple of four. Its matrix instructions run behind its back: between
// wgmma_fence() and the wgmma_wait() that covers them, no thread touches their accumulators or operands.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "gpu.h"
#include "numbers.h"
#include "tensor.h"

namespace ard {

// A box of `columns` x `rows` elements of two bytes out of a (B, H, T, D) tensor, as TMA copies it: the shared memory
// has rows of exactly `columns`, which are as many as fit in the swizzle's span of 32, 64 or 128 bytes.
struct TensorBox {
  int columns, rows, swizzle;
};

// (D, T, H, B), fastest first; strides in bytes. A dimension of one element has any stride: TMA is told that
// of packed memory.
struct TensorExtents {
  uint64_t size[4], stride[4];
};

inline TensorExtents tensor_extents(const HeadsView& x, int head_dim, int tokens, int heads, int batch) {
  const int sizes[4] = {head_dim, tokens, heads, batch};
  const int64_t strides[4] = {1, x.stride_token, x.stride_head, x.stride_batch};
  TensorExtents extents;
  for (int i = 0; i < 4; ++i) {
    extents.size[i] = static_cast<uint64_t>(sizes[i]);
    extents.stride[i] =
        i == 0 || sizes[i] > 1 ? static_cast<uint64_t>(strides[i]) * 2 : extents.stride[i - 1] * extents.size[i - 1];
  }
  return extents;
}

}  // namespace ard

#ifndef __CUDACC__
#include "hopper_emulator.h"
#else

#include <cuda.h>  // types only: the one function of the driver is looked up at run time

namespace ard {

// Tensor maps

using TensorMap = CUtensorMap;

inline TensorMap make_tensor_map(const HeadsView& x, DType dtype, const TensorExtents& extents, const TensorBox& box) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const auto swizzle = box.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : box.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const uint32_t boxes[4] = {static_cast<uint32_t>(box.columns), static_cast<uint32_t>(box.rows), 1, 1};
  const uint32_t every[4] = {1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      encode(&map, type, 4, x.data, extents.size, extents.stride + 1, boxes, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

// `value` is the same on all threads of the warp: lets the compiler keep it in a uniform register.
ARD_DEVICE int warp_uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Barriers in shared memory. A phase ends when `arrivals` threads have arrived and all expected bytes have landed;
// wait(parity) returns when the phase of that parity has ended (at first, parity 1 has).

ARD_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// The initialised barriers become visible to the copy engine; before the sync_block() that shows them to the threads.
ARD_DEVICE void mbarrier_fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

ARD_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

ARD_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

ARD_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// The copy engine

ARD_DEVICE void tensor_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}

// Copy the box at (column, token, head, batch); its bytes count on `barrier`. What is outside of the tensor is zero.
ARD_DEVICE void tensor_load(void* to, const TensorMap& map, uint64_t* barrier, int column, int token, int head,
                            int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(to)),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column), "r"(token), "r"(head),
      "r"(batch)
      : "memory");
}

// Between this thread's ordinary accesses to shared memory and the copy engine's or tensor cores' to the same.
ARD_DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers per thread of this warpgroup from here on

template <int kRegisters>
ARD_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
ARD_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix instructions

ARD_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ARD_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kLeft>
ARD_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The compiler may not move accesses to these registers across this point.
template <int kCount>
ARD_DEVICE void pin_registers(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// Goes on when `value`, which is >= 0 on the whole warp, is known. ptxas moves a wgmma_wait ahead of arithmetic that
// does not need its result, but not over a branch: here is one that is never taken. The vote keeps it uniform.
ARD_DEVICE void hold_until(float value) {
  asm volatile(
      "{\n"
      ".reg .pred negative;\n"
      "setp.lt.f32 negative, %0, 0f00000000;\n"
      "vote.sync.any.pred negative, negative, 0xffffffff;\n"
      "@!negative bra.uni known;\n"
      "trap;\n"
      "known:\n"
      "}\n" ::"f"(value));
}

// d (64 x 2 kCount) = a b, or += with `kAdd`. a (64 x 16) and b (16 x 2 kCount, as its columns) are descriptors of
// shared memory in which the 16 are contiguous (K-major).
template <class T, bool kAdd, int kCount>
ARD_DEVICE void wgmma(float (&d)[kCount], uint64_t a, uint64_t b);

// d += a b with a in registers and b as its rows: the columns are contiguous (MN-major).
template <class T, int kCount>
ARD_DEVICE void wgmma_rows(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b);

#define ARD_OUT8(d, i)                                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define ARD_OUT16(d, i) ARD_OUT8(d, i), ARD_OUT8(d, i + 8)
#define ARD_OUT32(d, i) ARD_OUT16(d, i), ARD_OUT16(d, i + 16)
#define ARD_NAME8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define ARD_NAME16 ARD_NAME8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ARD_NAME32 ARD_NAME16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ARD_NAME48 ARD_NAME32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ARD_NAME64 ARD_NAME48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define ARD_WGMMA_N128(T, name, kAdd)                                                \
  template <>                                                                        \
  ARD_DEVICE void wgmma<T, kAdd, 64>(float (&d)[64], uint64_t a, uint64_t b) {       \
    asm volatile(                                                                    \
        "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                             \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" ARD_NAME64 \
        "}, %64, %65, add, 1, 1, 0, 0;\n}\n"                                         \
        : ARD_OUT32(d, 0), ARD_OUT32(d, 32)                                          \
        : "l"(a), "l"(b), "n"(static_cast<int>(kAdd)));                              \
  }
// The operands after `count` accumulators are called `i` (four of them) and `b`.
#define ARD_WGMMA_ROWS(T, name, n, count, i, b_name, ...)                                             \
  template <>                                                                                         \
  ARD_DEVICE void wgmma_rows<T, count>(float (&d)[count], const uint32_t (&a)[4], uint64_t b) {       \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" ARD_NAME##count \
                 "}, {" i "}, " b_name ", 1, 1, 1, 1;\n"                                              \
                 : __VA_ARGS__                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
  }
#define ARD_WGMMA(T, name)                                                      \
  ARD_WGMMA_N128(T, name, false)                                                \
  ARD_WGMMA_N128(T, name, true)                                                 \
  ARD_WGMMA_ROWS(T, name, 16, 8, "%8, %9, %10, %11", "%12", ARD_OUT8(d, 0))     \
  ARD_WGMMA_ROWS(T, name, 32, 16, "%16, %17, %18, %19", "%20", ARD_OUT16(d, 0)) \
  ARD_WGMMA_ROWS(T, name, 64, 32, "%32, %33, %34, %35", "%36", ARD_OUT32(d, 0)) \
  ARD_WGMMA_ROWS(T, name, 128, 64, "%64, %65, %66, %67", "%68", ARD_OUT32(d, 0), ARD_OUT32(d, 32))
ARD_WGMMA(bfloat16, "bf16")
ARD_WGMMA(float16, "f16")
#undef ARD_WGMMA
#undef ARD_WGMMA_ROWS
#undef ARD_WGMMA_N128

}  // namespace ard

#endif
