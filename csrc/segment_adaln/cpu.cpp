// The adaLN family on the CPU: cuts the work into units, picks the ISA, runs units in parallel.
// Every row is independent in the forward; in the backward the pieces of a segment leave partial row sums, and all
// units partial sums of dweight and dbias, that a second stage adds in order. The cuts depend on shapes only, so
// results are bit-equal for any number of threads.
#include "../common/isa.h"
#include "../common/output.h"
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

// Columns of dweight or dbias that are summed at a time.
constexpr int64_t kReducedColumns = 256;

std::vector<Unit> cut(const Segments& segments) {
  std::vector<Unit> units;
  int64_t pieces = 0;
  const auto add = [&](int64_t batch, int64_t segment, int64_t begin, int64_t end, int64_t piece) {
    if (begin < end) units.push_back({batch, segment, begin, end, piece, static_cast<int64_t>(units.size())});
  };
  for (int64_t batch = 0; batch < segments.batch; ++batch) {
    int64_t first = 0;  // the first short segment that no unit has yet
    for (int64_t segment = 0; segment < segments.count(); ++segment) {
      const int64_t begin = segments.start(segment), end = segments.start(segment + 1);
      if (end - segments.start(first) > kUnitTokens) {
        add(batch, first, segments.start(first), begin, -1);
        first = segment;
      }
      if (end - begin <= kUnitTokens) continue;
      for (int64_t t = begin; t < end; t += kUnitTokens) {
        add(batch, segment, t, t + kUnitTokens < end ? t + kUnitTokens : end, pieces++);
      }
      first = segment + 1;
    }
    add(batch, first, segments.start(first), segments.tokens, -1);
  }
  return units;
}

// Tokens of an output follow each other in memory.
int64_t bytes_of(const View& out, int64_t tokens, int64_t channels) { return tokens * channels * size_of(out.dtype); }

Output output_of(const View& out, const Segments& s) {
  return out ? Output(out.data, bytes_of(out, s.batch * s.tokens, s.channels)) : Output();
}

void claim(const Output& output, const View& out, const Unit& u, int64_t channels) {
  output.claim(out.row(u.batch, u.begin), bytes_of(out, u.end - u.begin, channels));
}

int threads(const Segments& s) { return s.batch * s.tokens * s.channels < kParallelElements ? 1 : s.threads; }

}  // namespace

void forward_cpu(CpuForwardParams params, const Segments& segments) {
  params.tokens = segments.tokens;
  params.channels = segments.channels;
  const Output h = output_of(params.h, segments), y = output_of(params.y, segments);
  params.stream_h = h.streams();
  params.stream_y = y.streams();
  const RowKernels& kernels = row_kernels();
  const std::vector<Unit> units = cut(segments);
  const int64_t count = static_cast<int64_t>(units.size());
#pragma omp parallel num_threads(threads(segments))
  {
    const auto scratch = make_scratch(kForwardBuffers * buffer_stride(params.channels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      claim(h, params.h, units[i], params.channels);
      claim(y, params.y, units[i], params.channels);
      kernels.forward(params, segments, units[i], scratch.get());
    }
  }
}

void backward_cpu(CpuBackwardParams params, const Segments& segments) {
  params.tokens = segments.tokens;
  params.channels = segments.channels;
  const Output dx = output_of(params.dx, segments), dbranch = output_of(params.dbranch, segments);
  params.stream_dx = dx.streams();
  params.stream_dbranch = dbranch.streams();
  const RowKernels& kernels = row_kernels();
  const std::vector<Unit> units = cut(segments);
  const int64_t count = static_cast<int64_t>(units.size());
  std::vector<std::pair<int64_t, int64_t>> sums;  // (first unit, number of units) of each segment in pieces
  int64_t pieces = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (units[i].piece < 0) continue;
    ++pieces;
    if (sums.empty() || units[sums.back().first].segment != units[i].segment ||
        units[sums.back().first].batch != units[i].batch)
      sums.push_back({i, 0});
    ++sums.back().second;
  }
  const int64_t row_sums = params.row_sums(), reductions = static_cast<int64_t>(sums.size()) * row_sums;
  params.parameter_workspace = params.workspace + pieces * row_sums * params.channels;
  const int64_t blocks = params.parameter_sums() ? (params.channels + kReducedColumns - 1) / kReducedColumns : 0;
#pragma omp parallel num_threads(threads(segments))
  {
    const auto scratch = make_scratch(kBackwardBuffers * buffer_stride(params.channels));
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      claim(dx, params.dx, units[i], params.channels);
      claim(dbranch, params.dbranch, units[i], params.channels);
      kernels.backward(params, segments, units[i], scratch.get());
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < reductions; ++i) {
      const auto& [first, parts] = sums[i / row_sums];
      kernels.reduce_rows(params, units[first], parts, static_cast<int>(i % row_sums), scratch.get());
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < 2 * blocks; ++i) {
      const int64_t begin = i / 2 * kReducedColumns, end = begin + kReducedColumns;
      kernels.reduce_parameter(params, count, static_cast<int>(i % 2), begin,
                               end < params.channels ? end : params.channels, scratch.get());
    }
  }
}

int64_t workspace_floats(const Segments& segments, const CpuBackwardParams& params) {
  const std::vector<Unit> units = cut(segments);
  int64_t rows = params.parameter_sums() ? 2 * static_cast<int64_t>(units.size()) : 0;
  for (const Unit& unit : units) rows += unit.piece < 0 ? 0 : params.row_sums();
  return rows * segments.channels;
}

}  // namespace ard
