// Moves 2 * B * H * L * D elements once in, once out; plain copies, so memory bounds it.
#include <cstring>

#include "params.h"

namespace ard {
namespace {

// Below this many bytes a second thread costs more than it saves.
constexpr int64_t kParallelBytes = 1 << 17;

char* row_of(const HeadsView& x, int64_t batch, int64_t head, int64_t token, int64_t element_bytes) {
  return static_cast<char*>(x.data) +
         (batch * x.stride_batch + head * x.stride_head + token * x.stride_token) * element_bytes;
}

}  // namespace

void append_cpu(const AppendParams& p) {
  // In the order of the source's memory: heads of a token that lie together are read together. Head by head each row
  // would be in a page of its own.
  const bool by_token = p.k.stride_token >= p.k.stride_head;
  const int64_t outer = by_token ? p.tokens : p.heads, inner = by_token ? p.heads : p.tokens;
  const int threads = 2 * p.batch * p.heads * p.tokens * p.row_bytes < kParallelBytes ? 1 : p.threads;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < 2 * p.batch * outer; ++i) {
    const HeadsView &from = i % 2 ? p.v : p.k, &to = i % 2 ? p.cache_v : p.cache_k;
    const int64_t batch = i / 2 / outer, at = i / 2 % outer;
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t head = by_token ? j : at, token = by_token ? at : j;
      std::memcpy(row_of(to, batch, head, token, p.element_bytes), row_of(from, batch, head, token, p.element_bytes),
                  p.row_bytes);
    }
  }
}

}  // namespace ard
