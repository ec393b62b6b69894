// Sums over tokens in the backward of adaLN: a thread's share while a chunk's tokens pass by, the chunk's partial sums,
// and the kernels that add those up in order. Included by backward.cu alone.
#pragma once

#include "gpu_rows.h"

namespace ard {
namespace {

// A thread's share of a row gradient, summed over the tokens: in registers, or in its own words of shared memory.
template <class Layout, bool kShared>
class Sum {
 public:
  static constexpr int kVector = Layout::kVector, kVectors = Layout::kVectors, kPieces = kVector / 4;

  // `shared`: kElements words for each thread of the block; not used when in registers.
  ARD_DEVICE explicit Sum(char* shared) : words(reinterpret_cast<Words*>(shared) + thread_index()) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) kept[v][i] = 0;
#pragma unroll
      for (int k = 0; kShared && k < kPieces; ++k) store_shared(word(v, k), Words{});
    }
  }

  ARD_DEVICE void add(int v, const float (&term)[kVector]) {
    if constexpr (kShared) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        Words sum = load_shared(word(v, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.word[i] = word_of(float_of_word(sum.word[i]) + term[4 * k + i]);
        store_shared(word(v, k), sum);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) kept[v][i] += term[i];
    }
  }

  ARD_DEVICE typename Layout::Values& values() {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int k = 0; kShared && k < kPieces; ++k) {
        const Words sum = load_shared(word(v, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[v][4 * k + i] = float_of_word(sum.word[i]);
      }
    }
    return kept;
  }

 private:
  ARD_DEVICE Words* word(int v, int k) const { return words + (v * kPieces + k) * block_threads(); }

  typename Layout::Values kept;
  Words* words;
};

// The sums of the rows that the block worked on side by side, added in order on the first of them.
template <class Layout>
ARD_DEVICE void add_rows_of_block(typename Layout::Values& sums, const Place& at) {
  if (at.rows == 1) return;
  Words* const shared = reinterpret_cast<Words*>(shared_memory());
  constexpr int kPieces = Layout::kVector / 4;
  sync_block();  // what was here has been read
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      const float* s = sums[v] + 4 * k;
      store_shared(shared + (v * kPieces + k) * block_threads() + thread_index(),
                   Words{{word_of(s[0]), word_of(s[1]), word_of(s[2]), word_of(s[3])}});
    }
  }
  sync_block();
  if (at.row > 0) return;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {
      for (int row = 1; row < at.rows; ++row) {
        const Words w = load_shared(shared + (v * kPieces + k) * block_threads() + row * at.threads + at.thread);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[v][4 * k + i] += float_of_word(w.word[i]);
      }
    }
  }
}

// Write the chunk's k-th partial sum.
template <class Layout, bool kShared>
ARD_DEVICE void store_partial(Sum<Layout, kShared>& sum, const GpuBackwardParams& p, int k, int count,
                              const Place& at) {
  typename Layout::Values& sums = sum.values();
  add_rows_of_block<Layout>(sums, at);
  if (at.row > 0) return;
  float* const to = p.workspace + (static_cast<int64_t>(block_index()) * count + k) * p.channels;
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    const int e = at.element<Layout>(v);
    if (e < at.channels) store_vector(reinterpret_cast<char*>(to + e), DType::kFloat32, sums[v]);
  }
}

constexpr int kAddThreads = 64;

// Sums of `count` rows `stride` apart, in order, 4 columns.
ARD_DEVICE void sum_in_order(const float* from, int count, int64_t stride, float (&total)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) total[j] = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i, from += stride) {
    float part[4];
    load_vector<true>(reinterpret_cast<const char*>(from), DType::kFloat32, part);
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] += part[j];
  }
}

// 4 elements of a row of any alignment, as fp32.
ARD_DEVICE void load_columns(const View& view, int batch, int row, int column, float (&values)[4]) {
  const char* from = row_address(view, batch, row) + column * bytes_of(view.dtype);
  load_vector<false>(from, view.dtype, values);
}

// One segment's row gradient from its chunks' sums, 4 columns a thread; its share of dbias and dweight. Grid: (samples
// x segments) x (sums x blocks of columns).
ARD_KERNEL(kAddThreads, 8) add_chunks(const ARD_GRID_CONSTANT GpuBackwardParams p) {
  const int channels = static_cast<int>(p.channels), sums = p.sums;
  const int k = block_index_y() % sums, batch = block_index() / p.work.segments;
  const int segment = block_index() % p.work.segments;
  const int column = 4 * (block_index_y() / sums * kAddThreads + thread_index());
  if (column >= channels) return;
  const int first = p.work.spans[2 * segment], count = p.work.spans[2 * segment + 1] - first;
  const int64_t chunk = static_cast<int64_t>(batch) * p.work.chunk_count + first;
  const int64_t stride = static_cast<int64_t>(sums) * channels;
  const float* from = p.workspace + (chunk * sums + k) * channels + column;
  const bool is_gate = p.gate.data && k == 0, is_scale = !is_gate && k == sums - 1;
  float total[4], other[4];
  sum_in_order(from, count, stride, total);
  if (!is_gate && p.parameter_workspace) {
    float scale[4] = {0, 0, 0, 0};
    if (p.scale.data) load_columns(p.scale, batch, segment, column, scale);
#pragma unroll
    for (int j = 0; j < 4; ++j) other[j] = (1 + scale[j]) * total[j];
    float* const share = p.parameter_workspace + (2 * static_cast<int64_t>(block_index()) + is_scale) * channels;
    store_vector(reinterpret_cast<char*>(share + column), DType::kFloat32, other);
  }
  const View& out = is_gate ? p.dgate : is_scale ? p.dscale : p.dshift;
  if (out.data == nullptr) return;
  if (is_scale && p.weight.data) {
    load_columns(p.weight, 0, 0, column, other);
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] *= other[j];
  }
  if (is_scale && p.bias.data) {
    float bias[4];
    load_columns(p.bias, 0, 0, column, bias);
    sum_in_order(from - channels, count, stride, other);
#pragma unroll
    for (int j = 0; j < 4; ++j) total[j] += bias[j] * other[j];
  }
  store_vector(row_address(out, batch, segment) + column * bytes_of(out.dtype), out.dtype, total);
}

// dbias (y = 0) or dweight (y = 1) from the shares (rows, 2, C) of segments or chunks, in order, 4 columns a thread.
ARD_KERNEL(kAddThreads, 8) add_parameters(const ARD_GRID_CONSTANT GpuBackwardParams p) {
  const int channels = static_cast<int>(p.channels), k = block_index_y();
  const int column = 4 * (block_index() * kAddThreads + thread_index());
  const View& out = k == 0 ? p.dbias : p.dweight;
  if (column >= channels || out.data == nullptr) return;
  const int rows = p.work.batch * (p.work.rows_per_token ? p.work.chunk_count : p.work.segments);
  float total[4];
  sum_in_order(p.parameter_workspace + k * channels + column, rows, 2 * channels, total);
  store_vector(row_address(out, 0, 0) + column * bytes_of(out.dtype), out.dtype, total);
}

}  // namespace
}  // namespace ard
