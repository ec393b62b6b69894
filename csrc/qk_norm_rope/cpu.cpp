// qk_norm_rope on the CPU: cuts the tokens into chunks, picks the ISA, runs chunks in parallel. In the backward a chunk
// leaves its sums for weight and bias, and they are added in order: results are bit-equal for any number of threads.
#include "../common/isa.h"
#include "../common/output.h"
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

struct Span {
  const char* data = nullptr;
  int64_t bytes = 0;
};

// Tokens [begin, end) of the batch * tokens follow each other in memory; in a packed output other sections lie between.
Span tokens_of(const NormRope& p, const HeadsView& out, int64_t begin, int64_t end) {
  if (begin == end) return {};
  const auto place = [&](int64_t n) {
    return (n / p.tokens * out.stride_batch + n % p.tokens * out.stride_token) * size_of(p.dtype);
  };
  const int64_t first = place(begin), last = place(end - 1);
  return {static_cast<const char*>(out.data) + first, last - first + p.channels() * size_of(p.dtype)};
}

Output output_of(const NormRope& p, const HeadsView& out) {
  const Span all = tokens_of(p, out, 0, p.batch * p.tokens);
  return Output(all.data, all.bytes, elements(p) * size_of(p.dtype));
}

void claim(const Output& output, const NormRope& p, const HeadsView& out, int64_t begin, int64_t end) {
  const Span chunk = tokens_of(p, out, begin, end);
  output.claim(chunk.data, chunk.bytes);
}

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
  const Output y = output_of(p, p.y);
  for_chunks(p, threads, [&](int64_t, int64_t begin, int64_t end, float* scratch) {
    claim(y, p, p.y, begin, end);
    kernels.forward(p, begin, end, y.streams(), scratch);
  });
}

void norm_rope_backward_cpu(const NormRopeBackward& p, int threads) {
  const NormRopeKernels& kernels = kernels_in_use();
  const Output dx = output_of(p, p.dx);
  for_chunks(p, threads, [&](int64_t chunk, int64_t begin, int64_t end, float* scratch) {
    claim(dx, p, p.dx, begin, end);
    kernels.backward(p, begin, end, dx.streams(), p.workspace + chunk * p.sums() * p.parameter_width(), scratch);
  });
  if (p.sums() == 0) return;
  const auto scratch = make_scratch(scratch_floats(p));
  kernels.reduce(p, norm_rope_chunks_cpu(p.batch * p.tokens), scratch.get());
}

}  // namespace ard
