// The adaLN family on the CPU: cuts the work into units, picks the ISA, runs units in parallel.
// Every row is independent in the forward; in the backward the units of a segment leave partial row sums that a second
// stage adds in order. Both cuts depend on shapes only, so results are bit-equal for any number of threads.
#include "../common/isa.h"
#include "../common/scratch.h"
#include "row_kernels.h"

namespace ard {

namespace {

const RowKernels& row_kernels() {
#if defined(ARD_X86)
  return for_isa<RowKernels>({&row_kernels_avx512, &row_kernels_avx2, &row_kernels_baseline});
#else
  return row_kernels_baseline;
#endif
}

std::vector<Unit> cut(const Segments& segments) {
  std::vector<Unit> units;
  int64_t partials = 0;
  for (int64_t batch = 0; batch < segments.batch; ++batch) {
    for (int64_t segment = 0; segment < segments.count(); ++segment) {
      const int64_t begin = segments.start(segment), end = segments.start(segment + 1);
      const bool whole = end - begin <= kUnitTokens;
      for (int64_t t = begin; t < end; t += kUnitTokens) {
        const int64_t stop = t + kUnitTokens < end ? t + kUnitTokens : end;
        units.push_back({batch, segment, t, stop, whole ? -1 : partials++});
      }
    }
  }
  return units;
}

bool streams(const View& out, const Segments& s) {
  return out && s.batch * s.tokens * s.channels * size_of(out.dtype) >= kStreamBytes;
}

int threads(const Segments& s) { return s.batch * s.tokens * s.channels < kParallelElements ? 1 : s.threads; }

}  // namespace

void forward_cpu(ForwardParams params, const Segments& segments) {
  params.tokens = segments.tokens;
  params.channels = segments.channels;
  params.stream_h = streams(params.h, segments);
  params.stream_y = streams(params.y, segments);
  const RowKernels& kernels = row_kernels();
  const std::vector<Unit> units = cut(segments);
  const int64_t count = static_cast<int64_t>(units.size());
#pragma omp parallel num_threads(threads(segments))
  {
    const auto scratch = make_scratch(kForwardBuffers * buffer_stride(params.channels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) kernels.forward(params, units[i], scratch.get());
  }
}

void backward_cpu(BackwardParams params, const Segments& segments) {
  params.tokens = segments.tokens;
  params.channels = segments.channels;
  params.stream_dx = streams(params.dx, segments);
  params.stream_dbranch = streams(params.dbranch, segments);
  const RowKernels& kernels = row_kernels();
  const std::vector<Unit> units = cut(segments);
  const int64_t count = static_cast<int64_t>(units.size());
  std::vector<std::pair<int64_t, int64_t>> sums;  // (first unit, number of units) of each segment with partials
  for (int64_t i = 0; i < count; ++i) {
    if (units[i].partial < 0) continue;
    if (sums.empty() || units[sums.back().first].segment != units[i].segment ||
        units[sums.back().first].batch != units[i].batch)
      sums.push_back({i, 0});
    ++sums.back().second;
  }
  const int64_t row_sums = params.row_sums(), reductions = static_cast<int64_t>(sums.size()) * row_sums;
#pragma omp parallel num_threads(threads(segments))
  {
    const auto scratch = make_scratch(kBackwardBuffers * buffer_stride(params.channels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) kernels.backward(params, units[i], scratch.get());
#pragma omp for schedule(static)
    for (int64_t i = 0; i < reductions; ++i) {
      const auto& [first, parts] = sums[i / row_sums];
      kernels.reduce(params, units[first], parts, static_cast<int>(i % row_sums), scratch.get());
    }
  }
}

int64_t workspace_floats(const Segments& segments, int row_sums) {
  int64_t partials = 0;
  for (int64_t segment = 0; segment < segments.count(); ++segment) {
    const int64_t length = segments.start(segment + 1) - segments.start(segment);
    if (length > kUnitTokens) partials += (length + kUnitTokens - 1) / kUnitTokens;
  }
  return partials * segments.batch * row_sums * segments.channels;
}

}  // namespace ard
