// GELU on the CPU: cuts the array into chunks, picks the ISA, runs chunks in parallel.
#include <algorithm>

#include "../common/isa.h"
#include "../common/output.h"
#include "../common/scratch.h"
#include "kernels.h"

namespace ard {

namespace {

const GeluKernels& kernels_in_use() {
#if defined(ARD_X86)
  return for_isa<GeluKernels>({&gelu_kernels_avx512, &gelu_kernels_avx2, &gelu_kernels_baseline});
#else
  return gelu_kernels_baseline;
#endif
}

const char* at(const void* x, int64_t byte) { return static_cast<const char*>(x) + byte; }
char* at(void* x, int64_t byte) { return static_cast<char*>(x) + byte; }

// Chunks whose memory is claimed at once.
constexpr int64_t kClaimedChunks = 16;

// Calls run(first byte, elements, scratch) for every chunk of `out`.
template <class Run>
void for_chunks(void* out, int64_t n, DType dtype, int threads, Run run) {
  const Output output(out, n * size_of(dtype));
#pragma omp parallel num_threads(n < kParallelElements ? 1 : threads)
  {
    alignas(64) float scratch[3 * kGeluChunk];
#pragma omp for schedule(static)
    for (int64_t first = 0; first < n; first += kGeluChunk) {
      const int64_t byte = first * size_of(dtype), rest = n - first;
      if (first % (kClaimedChunks * kGeluChunk) == 0)
        output.claim(at(out, byte), std::min(rest, kClaimedChunks * kGeluChunk) * size_of(dtype));
      run(byte, std::min(rest, kGeluChunk), scratch);
    }
  }
}

}  // namespace

void gelu_forward_cpu(const void* x, void* y, int64_t n, DType dtype, int threads) {
  const GeluKernels& kernels = kernels_in_use();
  for_chunks(y, n, dtype, threads, [&](int64_t byte, int64_t count, float* scratch) {
    kernels.forward(at(x, byte), at(y, byte), count, dtype, scratch);
  });
}

void gelu_backward_cpu(const void* grad, const void* x, void* dx, int64_t n, DType dtype, int threads) {
  const GeluKernels& kernels = kernels_in_use();
  for_chunks(dx, n, dtype, threads, [&](int64_t byte, int64_t count, float* scratch) {
    kernels.backward(at(grad, byte), at(x, byte), at(dx, byte), count, dtype, scratch);
  });
}

}  // namespace ard
