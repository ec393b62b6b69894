// qk_norm_rope on the CPU: cuts the tokens into chunks, picks the ISA, runs chunks in parallel. In the backward a chunk
// leaves its sums for weight and bias, and they are added in order: results are bit-equal for any number of threads.
#include "../common/isa.h"
#include "../common/scratch.h"
#include "row_kernels.h"

namespace ard {

namespace {

const NormRopeKernels& kernels_in_use() {
#if defined(ARD_X86)
  return for_isa<NormRopeKernels>({&norm_rope_kernels_avx512, &norm_rope_kernels_avx2, &norm_rope_kernels_baseline});
#else
  return norm_rope_kernels_baseline;
#endif
}

int64_t elements(const NormRope& p) { return p.batch * p.tokens * p.channels(); }

bool streams(const NormRope& p) { return elements(p) * size_of(p.dtype) >= kStreamBytes; }

int used_threads(const NormRope& p, int threads) { return elements(p) < kParallelElements ? 1 : threads; }

int64_t scratch_floats(const NormRope& p) {
  return kTokenBuffers * buffer_stride(p.channels()) + kTableBuffers * buffer_stride(p.head_dim);
}

// Calls run(chunk, first token, stop token, scratch) for every chunk.
template <class Run>
void for_chunks(const NormRope& p, int threads, Run run) {
  const int64_t tokens = p.batch * p.tokens, count = norm_rope_chunks_cpu(tokens);
#pragma omp parallel num_threads(used_threads(p, threads))
  {
    const auto scratch = make_scratch(scratch_floats(p));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const int64_t stop = (i + 1) * kChunkTokens;
      run(i, i * kChunkTokens, stop < tokens ? stop : tokens, scratch.get());
    }
  }
}

}  // namespace

int64_t norm_rope_chunks_cpu(int64_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

void norm_rope_forward_cpu(const NormRopeForward& p, int threads) {
  const NormRopeKernels& kernels = kernels_in_use();
  const bool stream = streams(p);
  for_chunks(p, threads, [&](int64_t, int64_t begin, int64_t end, float* scratch) {
    kernels.forward(p, begin, end, stream, scratch);
  });
}

void norm_rope_backward_cpu(const NormRopeBackward& p, int threads) {
  const NormRopeKernels& kernels = kernels_in_use();
  const bool stream = streams(p);
  for_chunks(p, threads, [&](int64_t chunk, int64_t begin, int64_t end, float* scratch) {
    kernels.backward(p, begin, end, stream, p.workspace + chunk * p.sums() * p.parameter_width(), scratch);
  });
  if (p.sums() == 0) return;
  const auto scratch = make_scratch(scratch_floats(p));
  kernels.reduce(p, norm_rope_chunks_cpu(p.batch * p.tokens), scratch.get());
}

}  // namespace ard
