// The Hopper forward, as the bindings see it.
#pragma once

#include "params.h"
#include "sm90_layout.h"

namespace ard {

// out and lse, by at most `multiprocessors` persistent thread blocks; for arguments that sm90_serves.
template <int kHeadDim>
void attention_forward_sm90(const AttentionParams& params, DType dtype, int multiprocessors, void* stream);

// Whether the copy engine can read this tensor: its address and its strides are multiples of 16 bytes, and no dimension
// is expanded (stride 0).
inline bool sm90_reads(const HeadsView& x, int tokens, int heads, int batch) {
  const auto fits = [](int64_t stride, int size) {
    return size <= 1 || (stride > 0 && stride % 8 == 0 && stride < int64_t{1} << 39);
  };
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && fits(x.stride_token, tokens) && fits(x.stride_head, heads) &&
         fits(x.stride_batch, batch);
}

// Whether the kernel takes these arguments on a chip of compute capability 9.0: bf16 or fp16, scale >= 0, keys that are
// not split. Rows of `out` are written 16 bytes at a time.
inline bool sm90_serves(const AttentionParams& p, DType dtype) {
  const auto aligned = [](int64_t stride) { return stride % 8 == 0; };
  return dtype != DType::kFloat32 && p.flip == 0 && p.splits == 1 && sm90_reads(p.q, p.tokens, p.heads, p.batch) &&
         sm90_reads(p.k, p.key_tokens, p.kv_heads, p.batch) && sm90_reads(p.v, p.key_tokens, p.kv_heads, p.batch) &&
         reinterpret_cast<uintptr_t>(p.out.data) % 16 == 0 && aligned(p.out.stride_token) &&
         aligned(p.out.stride_head) && aligned(p.out.stride_batch);
}

}  // namespace ard
