// Attention of one query a head, as in decoding: every key and value is read once, and little is computed with it.
//
//     out = sum_j p_j v_j,    p_j = exp(s_j - lse),    s_j = scale q . k_j + bias_j,    lse = ln sum_j exp(s_j)
//
// Keys are taken in chunks of one size, each by one thread for all heads that share them; a chunk leaves its largest score,
// the sum of exponentials and the weighted sum of values, and chunks are put together in their order. Scores and sums are
// fp32. The result is the same for any number of threads.

#include <ATen/Parallel.h>

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

extern "C" {

// As one_query.py fills it in. Strides are in elements; the last axis is contiguous. q (B,H,D), k (B,Hkv,S,D),
// v (B,Hkv,S,Dv), out (B,H,Dv) and lse (B,H) contiguous.
struct Query {
  int64_t B, H, Hkv, S, D, Dv, bf16;
  float scale;
  const void *q, *k, *v;
  void *out;
  float *lse;
  int64_t q_stride[2], k_stride[3], v_stride[3];
  const int64_t *lengths;  // (B), each at least 1, or null: keys from there on are padding
  const float *bias;       // of batch, head and key, or null
  int64_t bias_stride[2];
};
}

namespace {

constexpr Index CHUNK = 512;         // keys
constexpr Index SHARED = 1 << 19;    // numbers in keys and values; fewer are read sooner than another thread wakes
constexpr Index BLOCK = 4 * WIDTH;   // columns of values that are summed in registers

template <typename T>
inline void widen(const T *from, float *to, Index n) {
  for (Index i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

// sum += sum_j p[j] v_j over n rows of v, `pitch` apart, `width` wide.
template <typename T>
void weighted(const float *p, const T *v, Index pitch, Index n, float *sum, Index width) {
  Index c = 0;
  for (; c + BLOCK <= width; c += BLOCK) {
    Floats acc[4];
    for (Index i = 0; i < 4; ++i) acc[i] = Floats::loadu(sum + c + i * WIDTH);
    for (Index j = 0; j < n; ++j) {
      const Floats weight(p[j]);
      Floats x[4];
      load(v + j * pitch + c, x[0], x[1]);
      load(v + j * pitch + c + 2 * WIDTH, x[2], x[3]);
      for (Index i = 0; i < 4; ++i) acc[i] = at::vec::fmadd(weight, x[i], acc[i]);
    }
    for (Index i = 0; i < 4; ++i) acc[i].store(sum + c + i * WIDTH);
  }
  for (Index j = 0; j < n && c < width; ++j)
    for (Index i = c; i < width; ++i) sum[i] += p[j] * static_cast<float>(v[j * pitch + i]);
}

// Numbers of n scores made exponentials over their largest, which is returned with their sum.
std::pair<float, float> exponentials(float *s, Index n) {
  float most = -std::numeric_limits<float>::infinity();
  for (Index j = 0; j < n; ++j) most = std::max(most, s[j]);
  if (most == -std::numeric_limits<float>::infinity()) {
    std::fill_n(s, n, 0.f);
    return {most, 0.f};
  }
  Floats sum(0.f);
  Index j = 0;
  for (; j + WIDTH <= n; j += WIDTH) {
    const Floats e = exponential(Floats::loadu(s + j) - Floats(most));
    e.store(s + j);
    sum = sum + e;
  }
  float all = total(sum);
  if (j < n) {
    float rest[WIDTH];
    std::fill_n(rest, WIDTH, -std::numeric_limits<float>::infinity());
    for (Index i = j; i < n; ++i) rest[i - j] = s[i] - most;
    exponential(Floats::loadu(rest)).store(rest);
    for (Index i = j; i < n; ++i) all += s[i] = rest[i - j];
  }
  return {most, all};
}

template <typename T>
void run(const Query &p) {
  const Index G = p.H / p.Hkv, chunks = (p.S + CHUNK - 1) / CHUNK, width = p.Dv + 2;
  std::vector<float> partial(p.B * p.H * chunks * width, 0.f); // the largest score, the sum, the values
  const Index units = p.B * p.Hkv * chunks;
  const bool alone = p.B * p.Hkv * p.S * (p.D + p.Dv) < SHARED;
  at::parallel_for(0, units, alone ? units : 1, [&](Index first, Index stop) {
    std::vector<float> query(p.D), scores(CHUNK);
    for (Index unit = first; unit < stop; ++unit) {
      const Index chunk = unit % chunks, b = unit / chunks / p.Hkv, g = unit / chunks % p.Hkv;
      const Index from = chunk * CHUNK, n = std::min(CHUNK, (p.lengths ? std::min(p.lengths[b], p.S) : p.S) - from);
      const T *k = static_cast<const T *>(p.k) + b * p.k_stride[0] + g * p.k_stride[1] + from * p.k_stride[2];
      const T *v = static_cast<const T *>(p.v) + b * p.v_stride[0] + g * p.v_stride[1] + from * p.v_stride[2];
      for (Index h = g * G; h < (g + 1) * G; ++h) {
        float *left = partial.data() + ((b * p.H + h) * chunks + chunk) * width;
        if (n <= 0) {
          left[0] = -std::numeric_limits<float>::infinity();
          continue;
        }
        widen(static_cast<const T *>(p.q) + b * p.q_stride[0] + h * p.q_stride[1], query.data(), p.D);
        Index j = 0;
        for (; j + 4 <= n; j += 4) {
          float sums[4][1];
          dot<4, 1>(k + j * p.k_stride[2], p.k_stride[2], query.data(), p.D, sums);
          for (Index i = 0; i < 4; ++i) scores[j + i] = p.scale * sums[i][0];
        }
        for (; j < n; ++j) {
          float sums[1][1];
          dot<1, 1>(k + j * p.k_stride[2], p.k_stride[2], query.data(), p.D, sums);
          scores[j] = p.scale * sums[0][0];
        }
        if (p.bias) {
          const float *bias = p.bias + b * p.bias_stride[0] + h * p.bias_stride[1] + from;
          for (j = 0; j < n; ++j) scores[j] += bias[j];
        }
        std::tie(left[0], left[1]) = exponentials(scores.data(), n);
        weighted(scores.data(), v, p.v_stride[2], n, left + 2, p.Dv);
      }
    }
  });
  for (Index row = 0; row < p.B * p.H; ++row) {
    const float *left = partial.data() + row * chunks * width;
    float most = left[0];
    for (Index c = 1; c < chunks; ++c) most = std::max(most, left[c * width]);
    std::vector<float> sum(p.Dv, 0.f);
    float all = 0.f;
    for (Index c = 0; c < chunks; ++c) {
      const float share = std::exp(left[c * width] - most);
      if (share == 0.f || most == -std::numeric_limits<float>::infinity()) continue;
      all += share * left[c * width + 1];
      for (Index i = 0; i < p.Dv; ++i) sum[i] += share * left[c * width + 2 + i];
    }
    p.lse[row] = most + std::log(all);
    T *out = static_cast<T *>(p.out) + row * p.Dv;
    for (Index i = 0; i < p.Dv; ++i) out[i] = T(all > 0.f ? sum[i] / all : 0.f);
  }
}

} // namespace

extern "C" void attention_of_one(const Query *p) { p->bf16 ? run<BFloat16>(*p) : run<float>(*p); }
