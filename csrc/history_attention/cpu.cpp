// Moves 2 * B * H * L * D elements once in, once out; plain copies, so memory bounds it.
#include <cstring>

#include "params.h"

namespace ard {
namespace {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 1 << 17;

void append_head(const HeadsView& in, const HeadsView& out, int64_t batch, int64_t head, const AppendParams& p) {
  const char* from =
      static_cast<const char*>(in.data) + (batch * in.stride_batch + head * in.stride_head) * p.element_bytes;
  char* to = static_cast<char*>(out.data) + (batch * out.stride_batch + head * out.stride_head) * p.element_bytes;
  const int64_t from_step = in.stride_token * p.element_bytes, to_step = out.stride_token * p.element_bytes;
  if (from_step == p.row_bytes && to_step == p.row_bytes) {
    std::memcpy(to, from, p.tokens * p.row_bytes);
    return;
  }
  for (int64_t t = 0; t < p.tokens; ++t) std::memcpy(to + t * to_step, from + t * from_step, p.row_bytes);
}

}  // namespace

void append_cpu(const AppendParams& p) {
  const int64_t copies = 2 * p.batch * p.heads;
  const int threads = copies * p.tokens * p.row_bytes < kParallelBytes ? 1 : p.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < copies; ++i) {
    const int64_t batch = i / 2 / p.heads, head = i / 2 % p.heads;
    append_head(i % 2 ? p.v : p.k, i % 2 ? p.cache_v : p.cache_k, batch, head, p);
  }
}

}  // namespace ard
