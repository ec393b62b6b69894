// Append a segment to the cache: cache_k = k, cache_v = v. Memory bounds it: 4 * B * H * L * D elements in and out.
//
// A thread moves one unit, 8 elements, of k and v alike: two 16-byte loads in flight, one set of indices. The units of
// one head follow each other in the order of the cache, so that its writes are whole; reads from a packed projection
// are rows of 2 * D bytes (for D = 72, 4.5 sectors of 32 bytes: the half that is left is the next head's).
#include "../common/eight.h"
#include "params.h"

namespace ard {
namespace {

constexpr int kThreads = 256;

template <class T>
ARD_DEVICE T* unit_of(const HeadsView& x, int batch, int head, int token, int unit) {
  return static_cast<T*>(x.data) + batch * x.stride_batch + head * x.stride_head + token * x.stride_token + 8 * unit;
}

// Grid (head_blocks * batch * heads).
template <class T>
ARD_KERNEL(kThreads, 8)
append(const ARD_GRID_CONSTANT AppendParams p) {
  const int block = block_index() % p.head_blocks, batch_head = block_index() / p.head_blocks;
  const int batch = batch_head / p.heads, head = batch_head % p.heads, units = p.head_dim / 8;
  const int i = block * kThreads + thread_index(), token = i / units, unit = i % units;
  if (token >= p.tokens) return;
  Eight<T> k, v;
  k.load_once(unit_of<T>(p.k, batch, head, token, unit));
  v.load_once(unit_of<T>(p.v, batch, head, token, unit));
  k.store(unit_of<T>(p.cache_k, batch, head, token, unit));
  v.store(unit_of<T>(p.cache_v, batch, head, token, unit));
}

template <class T>
void launch_append(AppendParams p, Stream stream) {
  const int64_t units = static_cast<int64_t>(p.tokens) * (p.head_dim / 8);
  p.head_blocks = static_cast<int32_t>((units + kThreads - 1) / kThreads);
  launch<append<T>>(static_cast<int64_t>(p.head_blocks) * p.batch * p.heads, 1, kThreads, 0, stream, p);
}

}  // namespace

void append_gpu(AppendParams p, DType dtype, void* stream) {
  const auto s = static_cast<Stream>(stream);
  switch (dtype) {
    case DType::kFloat32:
      return launch_append<float>(p, s);
    case DType::kBFloat16:
      return launch_append<bfloat16>(p, s);
    case DType::kFloat16:
      return launch_append<float16>(p, s);
  }
}

}  // namespace ard
