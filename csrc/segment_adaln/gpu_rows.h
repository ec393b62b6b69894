// How the adaLN kernels hold rows of C elements: which thread owns what, vectors between memory and fp32 registers, and
// the ring of tokens in shared memory.
//
// A vector is the elements of 16 bytes of the activations: 8 of 16 bits or 4 of 32. Vector v of thread i of a row is
// the elements kVector * (v * threads + i) and up, so a warp's accesses are contiguous in every dtype, and 16 bytes
// wide in that of the activations. Other dtypes come in 8 or twice 16 bytes: dtypes are looked at at run time, which is
// one uniform branch per vector and spares a kernel per combination.
#pragma once

#include <cstring>
#include <type_traits>

#include "../common/numbers.h"
#include "params.h"

namespace ard {

constexpr int kLanes = 32;

ARD_DEVICE int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// tensor.h's View::row for the device. `opaque`: seven tensors' addresses would take 28 registers throughout the loop.
ARD_DEVICE char* row_address(const View& view, int batch, int row) {
  return static_cast<char*>(view.data) +
         (opaque(batch) * view.stride_batch + row * view.stride_row) * bytes_of(view.dtype);
}

ARD_DEVICE uint32_t word_of(float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}

ARD_DEVICE float float_of_word(uint32_t word) {
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// kAligned: every vector of every input starts on a multiple of its access width; else inputs are read by elements.
template <int kVector_, int kElements_, bool kAligned_>
struct RowLayout {
  static constexpr bool kAligned = kAligned_;
  static constexpr int kVector = kVector_, kElements = kElements_, kVectors = kElements / kVector;
  using Values = float[kVectors][kVector];
};

// Where a thread stands: its place in its row, and which of the rows that the block works on at a time is its own.
struct Place {
  int thread, threads, row, rows, channels;

  ARD_DEVICE Place(const RowGeometry& geometry, int channels_)
      : thread(thread_index() % geometry.threads),
        threads(geometry.threads),
        row(thread_index() / geometry.threads),
        rows(geometry.rows),
        channels(channels_) {}

  template <class Layout>
  ARD_DEVICE int element(int v) const {
    return Layout::kVector * (v * threads + thread);
  }
};

// Variants of a kernel, so that each has registers enough. kPlain: a LayerNorm with all rows, no parameters, and all
// gradients wanted; rows are per segment or per token. The others take whatever there is.
enum class Rows { kPlain, kSegment, kToken };

// Call run(Rows) with the variant for a call.
template <class Run>
void with_rows(bool plain, bool per_token, Run run) {
  if (plain) return run(std::integral_constant<Rows, Rows::kPlain>{});
  if (per_token) return run(std::integral_constant<Rows, Rows::kToken>{});
  run(std::integral_constant<Rows, Rows::kSegment>{});
}

// A sample's chunk of tokens.
struct Chunk {
  int batch, segment, start, stop;

  ARD_DEVICE explicit Chunk(const GpuChunks& work) {
    const int32_t* entry = work.chunks + 3 * (block_index() % work.chunk_count);
    batch = block_index() / work.chunk_count;
    segment = entry[0], start = entry[1], stop = entry[2];
  }
};

// kVector elements in memory format: kVector words of fp32, half as many of 16 bits.
template <int kVector>
struct Packed {
  uint32_t word[kVector];
};

template <class T, int kVector>
ARD_DEVICE void widen_halves(const Packed<kVector>& packed, float (&value)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) value[i] = widen(T{static_cast<uint16_t>(packed.word[i / 2] >> (i % 2 * 16))});
}

template <int kVector>
ARD_DEVICE void unpack(const Packed<kVector>& packed, DType dtype, float (&value)[kVector]) {
  if (dtype == DType::kBFloat16) {
    widen_halves<bfloat16>(packed, value);
  } else if (dtype == DType::kFloat16) {
    widen_halves<float16>(packed, value);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) value[i] = float_of_word(packed.word[i]);
  }
}

template <class T, int kVector>
ARD_DEVICE void narrow_halves(const float (&value)[kVector], Packed<kVector>& packed) {
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) packed.word[i] = narrow2<T>(value[2 * i], value[2 * i + 1]);
}

template <int kVector>
ARD_DEVICE void pack(const float (&value)[kVector], DType dtype, Packed<kVector>& packed) {
  if (dtype == DType::kBFloat16) {
    narrow_halves<bfloat16>(value, packed);
  } else if (dtype == DType::kFloat16) {
    narrow_halves<float16>(value, packed);
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) packed.word[i] = word_of(value[i]);
  }
}

// Words of global memory, one element at a time: rows that are not aligned to their vectors.
template <class W>
ARD_DEVICE W gather(const char* from, bool wide) {
  W words{};
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(W) / 4); ++i) {
    if (wide) {
      words.word[i] = reinterpret_cast<const uint32_t*>(from)[i];
    } else {
      const uint16_t* half = reinterpret_cast<const uint16_t*>(from) + 2 * i;
      words.word[i] = half[0] | static_cast<uint32_t>(half[1]) << 16;
    }
  }
  return words;
}

ARD_DEVICE void load_words(const char* from, Words& words) { words = load_global(from); }
ARD_DEVICE void load_words(const char* from, Words2& words) { words = load_global2(from); }

template <bool kAligned, class W>
ARD_DEVICE W load_words(const char* from, bool wide) {
  if constexpr (!kAligned) return gather<W>(from, wide);
  W words;
  load_words(from, words);
  return words;
}

template <class W, int kVector>
ARD_DEVICE void place_words(const W& words, int piece, Packed<kVector>& packed) {
  constexpr int kWords = sizeof(W) / 4;
#pragma unroll
  for (int i = 0; i < kWords; ++i) packed.word[piece * kWords + i] = words.word[i];
}

// kVector elements at `from` in global memory, as fp32.
template <bool kAligned, int kVector>
ARD_DEVICE void load_vector(const char* from, DType dtype, float (&value)[kVector]) {
  using Half = std::conditional_t<kVector == 8, Words, Words2>;
  Packed<kVector> packed;
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < kVector / 4; ++k) place_words(load_words<kAligned, Words>(from + 16 * k, true), k, packed);
  } else {
    place_words(load_words<kAligned, Half>(from, false), 0, packed);
  }
  unpack(packed, dtype, value);
}

// Outputs are aligned. The values become what memory now holds, widened again.
template <int kVector>
ARD_DEVICE void store_vector(char* to, DType dtype, float (&value)[kVector]) {
  Packed<kVector> packed;
  pack(value, dtype, packed);
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < kVector / 4; ++k) {
      const uint32_t* w = packed.word + 4 * k;
      store_global(to + 16 * k, Words{{w[0], w[1], w[2], w[3]}});
    }
    return;
  }
  if constexpr (kVector == 8) {
    store_global(to, Words{{packed.word[0], packed.word[1], packed.word[2], packed.word[3]}});
  } else {
    store_global(to, Words2{{packed.word[0], packed.word[1]}});
  }
  unpack(packed, dtype, value);
}

// `plus` + vector v of a row of gate, shift, scale, weight or bias, or `plus` where there is none.
template <class Layout>
ARD_DEVICE void load_row_vector(const View& view, int batch, int row, int v, const Place& at, float plus,
                                float (&values)[Layout::kVector]) {
  const int e = at.element<Layout>(v);
#pragma unroll
  for (int i = 0; i < Layout::kVector; ++i) values[i] = plus;
  if (e >= at.channels || view.data == nullptr) return;
  load_vector<Layout::kAligned>(row_address(view, batch, row) + e * bytes_of(view.dtype), view.dtype, values);
#pragma unroll
  for (int i = 0; i < Layout::kVector; ++i) values[i] += plus;
}

// `plus` + a whole row of gate, shift or scale; where kMayBeAbsent and there is none, `absent` everywhere.
template <class Layout, bool kMayBeAbsent>
ARD_DEVICE void load_row(const View& view, int batch, int row, const Place& at, float plus, float absent,
                         typename Layout::Values& values) {
  const char* from = row_address(view, batch, row);
#pragma unroll
  for (int v = 0; v < Layout::kVectors; ++v) {
    const int e = at.element<Layout>(v);
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) values[v][i] = kMayBeAbsent ? absent : 0;
    if (e >= at.channels || (kMayBeAbsent && view.data == nullptr)) continue;
    load_vector<Layout::kAligned>(from + e * bytes_of(view.dtype), view.dtype, values[v]);
#pragma unroll
    for (int i = 0; i < Layout::kVector; ++i) values[v][i] += plus;
  }
}

// The tokens to come, in shared memory: each thread copies its own vectors there, `stages` tokens ahead, and reads only
// those, so no barrier is needed. A stage holds one token of each tensor; a tensor's part is planes of one access each
// (16 bytes, or 8) per thread of the block, hence free of bank conflicts.
template <class Layout, int kTensors>
struct Ring {
  static constexpr int kVector = Layout::kVector, kVectors = Layout::kVectors;
  View view[kTensors];
  int offset[kTensors];
  char* memory;
  int batch, stages, stage = 0, stage_bytes = 0;

  ARD_DEVICE Ring(char* memory_, int stages_, int batch_) : memory(memory_), batch(batch_), stages(stages_) {}

  template <int kTensor>
  ARD_DEVICE void add(const View& tensor) {
    view[kTensor] = tensor;
    offset[kTensor] = stage_bytes;
    if (tensor.data) stage_bytes += Layout::kElements * bytes_of(tensor.dtype) * block_threads();
  }

  // W is what one access moves.
  template <class W>
  ARD_DEVICE W* slot(int tensor, int piece) const {
    return reinterpret_cast<W*>(memory + stage * stage_bytes + offset[tensor]) + piece * block_threads() +
           thread_index();
  }

  ARD_DEVICE static void copy(Words* to, const char* from, bool inside) { cp_async(to, from, inside); }
  ARD_DEVICE static void copy(Words2* to, const char* from, bool inside) { cp_async_8(to, from, inside); }

  template <class W>
  ARD_DEVICE void fetch_piece(int tensor, int piece, const char* from, bool inside) {
    if constexpr (Layout::kAligned) {
      copy(slot<W>(tensor, piece), from, inside);
    } else {
      store_shared(slot<W>(tensor, piece), inside ? gather<W>(from, view[tensor].dtype == DType::kFloat32) : W{});
    }
  }

  // Start to bring `token` into the current stage, and go on to the next one. Zeros past the end of the row.
  ARD_DEVICE void fetch(int token, int stop, const Place& at) {
    if (token < stop) {
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
        if (view[t].data == nullptr) continue;
        const char* row = row_address(view[t], batch, token);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const int e = at.element<Layout>(v);
          const bool inside = e < at.channels;
          if (view[t].dtype == DType::kFloat32) {
#pragma unroll
            for (int k = 0; k < kVector / 4; ++k) {
              fetch_piece<Words>(t, v * (kVector / 4) + k, inside ? row + 4 * e + 16 * k : row, inside);
            }
          } else if constexpr (kVector == 8) {
            fetch_piece<Words>(t, v, inside ? row + 2 * e : row, inside);
          } else {
            fetch_piece<Words2>(t, v, inside ? row + 2 * e : row, inside);
          }
        }
      }
    }
    cp_async_commit();
    if (++stage == stages) stage = 0;
  }

  ARD_DEVICE void start(const Chunk& chunk, const Place& at) {
    for (int s = 0; s < stages; ++s) fetch(chunk.start + at.row + s * at.rows, chunk.stop, at);
  }

  // Until the current stage is there; each token's copies are one group, also when there are none.
  ARD_DEVICE void wait() const {
    if (stages == 4) {
      cp_async_wait<3>();
    } else if (stages == 2) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
  }

  // Vector v of the current stage as fp32.
  template <int kTensor>
  ARD_DEVICE void read(int v, float (&value)[kVector]) const {
    Packed<kVector> packed;
    if (view[kTensor].dtype == DType::kFloat32) {
#pragma unroll
      for (int k = 0; k < kVector / 4; ++k) {
        place_words(load_shared(slot<Words>(kTensor, v * (kVector / 4) + k)), k, packed);
      }
    } else if constexpr (kVector == 8) {
      place_words(load_shared(slot<Words>(kTensor, v)), 0, packed);
    } else {
      place_words(load_shared(slot<Words2>(kTensor, v)), 0, packed);
    }
    unpack(packed, view[kTensor].dtype, value);
  }
};

// Whether every vector of every row of the views that are present starts on a multiple of its access width.
template <class... Views>
bool are_aligned(int vector, const Views&... views) {
  const auto aligned = [vector](const View& view) {
    const int64_t bytes = size_of(view.dtype), width = vector * bytes < 16 ? vector * bytes : 16;
    return reinterpret_cast<int64_t>(view.data) % width == 0 && view.stride_batch * bytes % width == 0 &&
           view.stride_row * bytes % width == 0;
  };
  return (... && (!views || aligned(views)));
}

// How many tokens ahead: 4 while they take at most 48 KB, so that several blocks share a multiprocessor; else 2 or 1.
inline int ring_stages(int64_t stage_bytes, int64_t limit) {
  if (4 * stage_bytes <= 48 << 10) return 4;
  return 2 * stage_bytes <= limit ? 2 : 1;
}

// Bytes of one stage of `views`, those that are present.
template <class... Views>
int64_t stage_bytes(const RowGeometry& geometry, const Views&... views) {
  return (... + (views ? geometry.elements * size_of(views.dtype) * geometry.threads * geometry.rows : 0));
}

// Call run(RowLayout) with the layout of activations of 32 bits (wide) or 16; kWidest: elements of a vector of 16-bit
// activations where a thread owns 16 elements. `views` are the inputs.
template <int kWidest, class Run, class... Views>
void with_layout(bool wide, int elements, Run run, const Views&... views) {
  const auto choose = [&](auto layout16, auto layout32) { return wide ? run(layout32) : run(layout16); };
  const int vector = wide ? 4 : elements == 8 ? 8 : kWidest;
  if (are_aligned(vector, views...)) {
    if (elements == 8) return choose(RowLayout<8, 8, true>{}, RowLayout<4, 8, true>{});
    return choose(RowLayout<kWidest, 16, true>{}, RowLayout<4, 16, true>{});
  }
  if (elements == 8) return choose(RowLayout<8, 8, false>{}, RowLayout<4, 8, false>{});
  choose(RowLayout<kWidest, 16, false>{}, RowLayout<4, 16, false>{});
}

// Sums over a warp's lanes, on all of them.
ARD_DEVICE float warp_sum(float value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace ard
