// Attention forward for Hopper (sm_90a), out and lse as in sm80_forward.h: TMA, wgmma, three warpgroups with a role
// each (as FlashAttention-3, arXiv 2407.08608). One persistent block per multiprocessor walks over the items (query
// tile, head); static schedule, the longest tiles first.
//
//   producer    one thread fills the rings of K and V (and two stages of Q) as the consumers empty them
//   consumers   64 queries each: s = q k^T in registers, online softmax in base 2, o += p v with p from registers
//
// A consumer issues q k^T of the next key tile together with p v of this one, then does the softmax of the next while
// p v runs; the two consumers take turns at issuing, so that one's softmax hides behind the other's matrix products.
//
// Per key tile and consumer, in cycles of the tensor cores (64 x N x 16 takes N / 2): q k^T ceil(D / 16) * kBlockN / 2,
// p v kBlockN / 16 * ceil16(D) / 2; at D = 72: 320 + 320, of which 9 / 10 is useful. Softmax: 64 exp2 per thread at 4
// per cycle of a warp scheduler are 512 cycles; all in all about 580 instructions per warp.
#pragma once

#include "sm90_consumer.h"

namespace ard {
namespace sm90 {

// The boxes of a tile; their bytes count on `full`.
template <const TileLayout& kTile>
ARD_DEVICE void load_tile(char* to, const TensorMap (&maps)[2], uint64_t* full, int token, int head, int batch) {
  constexpr TileLayout kLayout = kTile;
  mbarrier_arrive_expect(full, kLayout.bytes());
#pragma unroll
  for (int g = 0; g < kLayout.groups; ++g) {
#pragma unroll
    for (int atom = 0; atom < kLayout.group[g].atoms(); ++atom) {
      tensor_load(to + kLayout.group_offset(g) + atom * kLayout.atom_bytes(g), maps[g], full,
                  kLayout.group[g].first + atom * kLayout.group[g].atom_columns(), token, head, batch);
    }
  }
}

template <class Traits>
ARD_DEVICE void produce(const Params& p, char* shared, Barriers& barriers) {
  constexpr TileLayout kQ = Traits::kQ, kK = Traits::kK, kV = Traits::kV;
  const AttentionParams& a = p.attention;
#pragma unroll
  for (int g = 0; g < kQ.groups; ++g) tensor_prefetch(p.q[g]), tensor_prefetch(p.k[g]), tensor_prefetch(p.v[g]);
  Ring<kQueryStages> q;
  Ring<Traits::kStages> kv;
  for (int64_t program = block_index(); program < p.programs; program += grid_blocks()) {
    const auto [tile, batch_head] = head_tile(program, a.batch * a.heads, a.tiles.group, a.tiles.tiles);
    const auto* const words = reinterpret_cast<const Words*>(a.tiles.items + tile);
    const Words first = load_global(words), second = load_global(words + 1);
    const TileItem item = item_of(first, second);
    const int batch = batch_head / a.heads, head = batch_head % a.heads, kv_head = head / a.share();
    const int full = item.full_tiles(), tiles = item.column_tiles();
    for (int j = 0; j < tiles; ++j) {
      int start, at = 0;
      if (j < full) {
        start = full_tile_start(item, j, kBlockN);
      } else {
        const MaskedTile& masked = a.tiles.masked[item.masked_begin + j - full];
        start = masked.start, at = masked.at;
      }
      mbarrier_wait(&barriers.empty_k[kv.stage], kv.parity ^ 1);
      if (j >= full) store_shared(&barriers.bounds_at[kv.stage], as_word(at));
      load_tile<Traits::kK>(shared + Traits::kOffsetK + kv.stage * kK.bytes(), p.k, &barriers.full_k[kv.stage], start,
                            kv_head, batch);
      if (j == 0) {  // behind the first K, which need not wait for a stage of Q
        mbarrier_wait(&barriers.empty_q[q.stage], q.parity ^ 1);
        Words(&message)[3] = barriers.message[q.stage].words;
        store_shared(&message[0], first), store_shared(&message[1], second);
        store_shared(&message[2], Words{{as_word(batch), as_word(head), as_word(batch_head), 0}});
        load_tile<Traits::kQ>(shared + q.stage * kQ.bytes(), p.q, &barriers.full_q[q.stage], item.row, head, batch);
        q.advance();
      }
      mbarrier_wait(&barriers.empty_v[kv.stage], kv.parity ^ 1);
      load_tile<Traits::kV>(shared + Traits::kOffsetV + kv.stage * kV.bytes(), p.v, &barriers.full_v[kv.stage], start,
                            kv_head, batch);
      kv.advance();
    }
  }
}

template <class T, int kHeadDim>
ARD_KERNEL(Traits<kHeadDim>::kThreads, 1)
attention_forward(const ARD_GRID_CONSTANT Params p) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Own = Traits<kHeadDim>;
  char* const shared = shared_memory();
  auto& barriers = *reinterpret_cast<Barriers*>(shared + Own::kOffsetBarriers);
  if (thread_index() == 0) {
    constexpr int kWarps = 4 * Own::kConsumers;
    for (int i = 0; i < kQueryStages; ++i) {
      mbarrier_init(&barriers.full_q[i], 1), mbarrier_init(&barriers.empty_q[i], kWarps);
    }
    for (int i = 0; i < Own::kStages; ++i) {
      mbarrier_init(&barriers.full_k[i], 1), mbarrier_init(&barriers.empty_k[i], kWarps);
      mbarrier_init(&barriers.full_v[i], 1), mbarrier_init(&barriers.empty_v[i], kWarps);
    }
    mbarrier_fence_init();
  }
  sync_block();
  const int warpgroup = warp_uniform(thread_index() / 128);
  if (warpgroup == 0) {
    lower_registers<Own::kProducerRegisters>();
    if (thread_index() == 0) produce<Own>(p, shared, barriers);
  } else {
    raise_registers<Own::kConsumerRegisters>();
    Consumer<T, Own>(p, shared, barriers, warpgroup - 1, thread_index() % 128).run();
  }
#endif
}

template <class T, int kHeadDim>
void launch_forward(const AttentionParams& a, DType dtype, int multiprocessors, void* stream) {
  using Own = Traits<kHeadDim>;
  bind_device();  // the driver's function below works on the calling thread's context, which may have none yet
  Params p;
  const auto maps = [&](TensorMap(&to)[2], const HeadsView& x, const TileLayout& layout, int tokens, int heads) {
    const TensorExtents extents = tensor_extents(x, kHeadDim, tokens, heads, a.batch);
    for (int g = 0; g < layout.groups; ++g) {
      const ColumnGroup& group = layout.group[g];
      to[g] = make_tensor_map(x, dtype, extents, {group.atom_columns(), layout.rows, group.swizzle});
    }
    if (layout.groups == 1) to[1] = to[0];  // no group uses it
  };
  maps(p.q, a.q, Own::kQ, a.tokens, a.heads);
  maps(p.k, a.k, Own::kK, a.key_tokens, a.kv_heads), maps(p.v, a.v, Own::kV, a.key_tokens, a.kv_heads);
  p.attention = a;
  p.programs = static_cast<int64_t>(a.tiles.tiles) * a.batch * a.heads;
  const int64_t blocks = p.programs < multiprocessors ? p.programs : multiprocessors;
  launch<attention_forward<T, kHeadDim>>(blocks, 1, Own::kThreads, Own::kSharedBytes, static_cast<Stream>(stream), p);
}

}  // namespace sm90

template <int kHeadDim>
void attention_forward_sm90(const AttentionParams& p, DType dtype, int multiprocessors, void* stream) {
  dtype == DType::kBFloat16 ? sm90::launch_forward<bfloat16, kHeadDim>(p, dtype, multiprocessors, stream)
                            : sm90::launch_forward<float16, kHeadDim>(p, dtype, multiprocessors, stream);
}

}  // namespace ard
