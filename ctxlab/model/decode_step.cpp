// What a block does to the few rows of a decoding step between two calls of attention, in one go.
//
// A step reads every weight once and computes little with it: its time is that of memory, on all cores, and of what is called.
// So a product, what is added, the norm behind it and the products that read the norm are one parallel region, in which
// every thread has its share of each matrix's rows, as they lie, and waits for the others where it needs theirs:
//
//     x' = x + W m + b             (or, post-norm, norm(x + W m + b))
//     y  = norm(x')                (or, post-norm, x')
//     out_i = W_i y + b_i          or the feed-forward layer, x' + down(f(gate(y)) up(y)), (post-norm, its norm)
//
// The residual stream and all sums are fp32. In bf16, matrices and what they read are bf16, and every result is rounded where
// torch's autocast rounds it. A row of a matrix is summed by one thread in one order: the result is the same for any number
// of threads.

#include <ATen/Parallel.h>

#include <omp.h>

#include "attention/vectors.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

extern "C" {

// y = W x + b: weight (n_out, n_in) contiguous, bias (n_out) in the matrix's dtype or null; weight null: there is none.
struct Matrix {
  const void *weight, *bias;
  int64_t n_out, n_in;
};

// RMSNorm, or centred LayerNorm with an optional bias; weight null: there is none.
struct Norm {
  const float *weight, *bias;
  double eps;
  int64_t centred;
};

// As decode_step.py fills it in. All rows are contiguous.
struct Step {
  int64_t R, d, bf16;
  const float *x;       // (R, d)
  float *to;            // (R, d): x', or what the feed-forward layer makes of it; null where nothing is added
  const void *mixed;    // (R, mixed.n_in)
  Matrix mix;
  Norm after, before;   // of post-norm and of pre-norm
  void *read;           // (R, d): y, or null
  int64_t n_products;
  Matrix products[3];
  void *outs[3];        // (R, n_out) each
  Matrix gate, up, down;
  int64_t activation;   // of ACTIVATIONS
  Norm last;            // of post-norm, behind the feed-forward layer
};
}

namespace {

enum Activation { SILU, GELU_TANH, GELU, RELU };

inline float rounded(float x, bool bf16) { return bf16 ? static_cast<float>(BFloat16(x)) : x; }

// ---- products ------------------------------------------------------------------------------------------------------

// Rows [first, stop) of W x + b for R rows x, each handed to put(row of x, row of W, number).
template <Index R, typename T, typename Put>
void rows_of(const Matrix &matrix, const float *x, Index first, Index stop, const Put &put) {
  constexpr Index M = R == 1 ? 4 : R <= 3 ? 2 : 1; // sums that registers hold
  const T *weight = static_cast<const T *>(matrix.weight), *bias = static_cast<const T *>(matrix.bias);
  const auto given = [&](Index m, Index r, float sum) { put(r, m, bias ? sum + static_cast<float>(bias[m]) : sum); };
  Index m = first;
  for (; m + M <= stop; m += M) {
    float sums[M][R];
    dot<M, R>(weight + m * matrix.n_in, matrix.n_in, x, matrix.n_in, sums);
    for (Index k = 0; k < M; ++k)
      for (Index r = 0; r < R; ++r) given(m + k, r, sums[k][r]);
  }
  for (; m < stop; ++m) {
    float sums[1][R];
    dot<1, R>(weight + m * matrix.n_in, matrix.n_in, x, matrix.n_in, sums);
    for (Index r = 0; r < R; ++r) given(m, r, sums[0][r]);
  }
}

// ---- norms and activations -----------------------------------------------------------------------------------------

float sum_of(const float *x, Index n, float less, bool squared) {
  Floats sum(0.f);
  Index i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    const Floats each = Floats::loadu(x + i) - Floats(less);
    sum = squared ? at::vec::fmadd(each, each, sum) : sum + each;
  }
  float all = total(sum);
  for (; i < n; ++i) all += squared ? (x[i] - less) * (x[i] - less) : x[i] - less;
  return all;
}

// y may be x itself.
void normed(const Norm &norm, const float *x, float *y, Index n, bool bf16) {
  const float mean = norm.centred ? sum_of(x, n, 0.f, false) / n : 0.f;
  const float scale = 1.f / std::sqrt(sum_of(x, n, mean, true) / n + static_cast<float>(norm.eps));
  for (Index i = 0; i < n; ++i)
    y[i] = rounded((x[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.f), bf16);
}

float activated(float x, Index activation) {
  switch (activation) {
    case SILU: return x / (1.f + std::exp(-x));
    case GELU_TANH: return 0.5f * x * (1.f + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case GELU: return 0.5f * x * (1.f + std::erf(x * 0.7071067811865476f));
    default: return std::max(x, 0.f);
  }
}

// ---- a step --------------------------------------------------------------------------------------------------------

// Room that lives from call to call; whoever calls has its own.
float *room(std::vector<float> &held, Index n) {
  if (held.size() < static_cast<size_t>(n)) held.resize(n);
  return held.data();
}

thread_local std::vector<float> mixed_room, hidden_room, read_room;

template <Index R, typename T>
void run(const Step &s) {
  constexpr bool bf16 = std::is_same_v<T, BFloat16>;
  const Index d = s.d;
  float *mixed = nullptr, *hidden = s.up.weight ? room(hidden_room, R * s.up.n_out) : nullptr;
  if (s.mix.weight) {
    mixed = room(mixed_room, R * s.mix.n_in);
    const T *from = static_cast<const T *>(s.mixed);
    for (Index i = 0; i < R * s.mix.n_in; ++i) mixed[i] = static_cast<float>(from[i]);
  }
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const Index thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const auto first = [&](Index n) { return n * thread / threads; };
    const auto stop = [&](Index n) { return n * (thread + 1) / threads; };
    const float *x = s.x;
    if (s.mix.weight) {
      rows_of<R, T>(s.mix, mixed, first(d), stop(d), [&](Index r, Index m, float y) { s.to[r * d + m] = x[r * d + m] + rounded(y, bf16); });
#pragma omp barrier
      if (s.after.weight) {
        if (thread == 0)
          for (Index r = 0; r < R; ++r) normed(s.after, s.to + r * d, s.to + r * d, d, false);
#pragma omp barrier
      }
      x = s.to;
    }
    float *read = room(read_room, R * d); // each thread's own: shorter than to wait
    for (Index r = 0; r < R; ++r) {
      if (s.before.weight) normed(s.before, x + r * d, read + r * d, d, bf16);
      else for (Index i = 0; i < d; ++i) read[r * d + i] = rounded(x[r * d + i], bf16);
    }
    if (s.read && thread == 0)
      for (Index i = 0; i < R * d; ++i) static_cast<T *>(s.read)[i] = T(read[i]);
    for (Index i = 0; i < s.n_products; ++i) {
      const Matrix &matrix = s.products[i];
      T *out = static_cast<T *>(s.outs[i]);
      rows_of<R, T>(matrix, read, first(matrix.n_out), stop(matrix.n_out), [&](Index r, Index m, float y) { out[r * matrix.n_out + m] = T(y); });
    }
    if (s.up.weight) {
      const Index n = s.up.n_out;
      rows_of<R, T>(s.up, read, first(n), stop(n), [&](Index r, Index m, float y) {
        const float up = rounded(y, bf16);
        hidden[r * n + m] = s.gate.weight ? up : rounded(activated(up, s.activation), bf16);
      });
      if (s.gate.weight)
        rows_of<R, T>(s.gate, read, first(n), stop(n), [&](Index r, Index m, float y) {
          const float gate = rounded(activated(rounded(y, bf16), s.activation), bf16);
          hidden[r * n + m] = rounded(gate * hidden[r * n + m], bf16);
        });
#pragma omp barrier
      rows_of<R, T>(s.down, hidden, first(d), stop(d), [&](Index r, Index m, float y) { s.to[r * d + m] = x[r * d + m] + rounded(y, bf16); });
      if (s.last.weight) {
#pragma omp barrier
        if (thread == 0)
          for (Index r = 0; r < R; ++r) normed(s.last, s.to + r * d, s.to + r * d, d, false);
      }
    }
  }
}

template <typename T>
void of_rows(const Step &s) {
  switch (s.R) {
    case 1: return run<1, T>(s);
    case 2: return run<2, T>(s);
    case 3: return run<3, T>(s);
    case 4: return run<4, T>(s);
  }
}

} // namespace

extern "C" {

void decode_step(const Step *s) { s->bf16 ? of_rows<BFloat16>(*s) : of_rows<float>(*s); }
}
