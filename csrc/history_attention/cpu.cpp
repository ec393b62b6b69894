// Appends a segment to the cache and attends to it, in one pass: a head's rows are copied when its queries are about to
// read them, so that they come from L1 and not once more from memory. Moves 2 * B * H_kv * L * D elements once in, once
// out, besides what attention does.
#include "cpu.h"

#include <cstring>

namespace ard {
namespace {

// Rows lie apart, each in a page of its own: neither where the next is read nor where it goes is foreseen by hardware.
constexpr int64_t kRowsAhead = 16;

struct HeadRows {
  char* data;
  int64_t step;  // bytes

  HeadRows(const HeadsView& x, int64_t batch, int64_t head, int64_t token, int64_t element_bytes)
      : data(static_cast<char*>(x.data) +
             (batch * x.stride_batch + head * x.stride_head + token * x.stride_token) * element_bytes),
        step(x.stride_token * element_bytes) {}

  char* row(int64_t i) const { return data + i * step; }
};

void copy_rows(const HeadRows& from, const HeadRows& to, int64_t rows, int64_t row_bytes) {
  const auto prefetch = [&](int64_t i) {
    if (i >= rows) return;
    for (int64_t byte = 0; byte < row_bytes; byte += 64) {
      __builtin_prefetch(from.row(i) + byte);
      __builtin_prefetch(to.row(i) + byte, 1);
    }
  };
  for (int64_t i = 0; i < kRowsAhead; ++i) prefetch(i);
  for (int64_t i = 0; i < rows; ++i) {
    prefetch(i + kRowsAhead);
    for (int64_t byte = 0; byte < row_bytes; byte += 16) std::memcpy(to.row(i) + byte, from.row(i) + byte, 16);
  }
}

}  // namespace

void history_attention_cpu(const AttentionCall& p, const AttentionTiles& tiles, const HeadsView& k, const HeadsView& v,
                           int64_t start) {
  const int64_t bytes = size_of(p.dtype);
  attention_forward_cpu(p, tiles, [&](int64_t batch, int64_t kv_head) {
    copy_rows({k, batch, kv_head, 0, bytes}, {p.k, batch, kv_head, start, bytes}, p.rows, p.head_dim * bytes);
    copy_rows({v, batch, kv_head, 0, bytes}, {p.v, batch, kv_head, start, bytes}, p.rows, p.head_dim * bytes);
  });
}

}  // namespace ard
