// Add up the partial results of split keys, in the order of the splits:
//   out = sum_i w_i partial_i / sum_i w_i total_i,  w_i = exp2(m_i - max m)
// A split without keys has m = -inf and counts nothing. A thread makes 8 elements of a row: every lane is busy, and its
// loads of different splits do not wait for each other. Bytes: (4 * splits + 2) * rows * D.
#include <cmath>

#include "../common/eight.h"
#include "params.h"

namespace ard {
namespace {

constexpr int kThreads = 256;

struct alignas(8) Statistics {
  float maximum, total;
};

template <class T>
ARD_KERNEL(kThreads, 4)
add_splits(const ARD_GRID_CONSTANT SplitsParams p) {
  const int units = p.head_dim / 8;
  const int64_t i = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  const int64_t all_rows = static_cast<int64_t>(p.batch) * p.heads * p.tokens;
  if (i >= all_rows * units) return;
  const int64_t row = i / units;
  const int unit = static_cast<int>(i % units);
  const auto* statistics = reinterpret_cast<const Statistics*>(p.workspace + p.splits * all_rows * p.head_dim) + row;

  float highest = -INFINITY;
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) highest = maximum(highest, statistics[split * all_rows].maximum);
  const float finite = highest == -INFINITY ? 0.f : highest;  // -inf - -inf is not a number
  float sum[8] = {}, total = 0;
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) {
    const Statistics own = statistics[split * all_rows];
    Eight<float> part;
    part.load_once(p.workspace + (split * all_rows + row) * p.head_dim + 8 * unit);
    float x[8];
    part.widen_to(x);
    const float factor = exp2_approx(own.maximum - finite);
    total += factor * own.total;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] += factor * x[j];
  }
  const float inverse = 1 / total;
#pragma unroll
  for (int j = 0; j < 8; ++j) sum[j] *= inverse;
  const int64_t head = row / p.tokens;
  T* out = static_cast<T*>(p.out.data) + head / p.heads * p.out.stride_batch + head % p.heads * p.out.stride_head +
           row % p.tokens * p.out.stride_token + 8 * unit;
  Eight<T> result;
  result.narrow_from(sum);
  result.store(out);
}

template <class T>
void launch_add_splits(const SplitsParams& p, Stream stream) {
  const int64_t threads = static_cast<int64_t>(p.batch) * p.heads * p.tokens * (p.head_dim / 8);
  launch<add_splits<T>>((threads + kThreads - 1) / kThreads, 1, kThreads, 0, stream, p);
}

}  // namespace

void add_splits_gpu(const SplitsParams& p, DType dtype, void* stream) {
  const auto s = static_cast<Stream>(stream);
  dtype == DType::kBFloat16 ? launch_add_splits<bfloat16>(p, s) : launch_add_splits<float16>(p, s);
}

}  // namespace ard
