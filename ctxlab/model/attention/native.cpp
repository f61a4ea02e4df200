// Attention with a bias on the CPU, tile by tile, forward and backward: what blockwise.py computes, compiled.
//
// A tile is keys x queries, so that everything that belongs to a query (maximum, sum, log-sum-exp) is a vector along a
// row, a bias of the distance i - j is a contiguous piece of one line, and no weight is ever transposed: with K, V the
// keys and values of a block, Q, G the queries and the gradients of the output,
//
//     forward   S' = K Q'     P' = exp(S' - max)     out' += V' P'
//     backward  S' = K Q'     P' = exp(S' - lse)     A' = V G'     dS' = P' (A' - delta)
//               dV += P' G    dK += dS' Q           dQ' += K' dS'
//
// Scores, sums and gradients over tiles are fp32. Every product is C = A B with A as it lies
// in memory and B packed once a block: for bf16 two rows to a word, as the processors' dot products want them.
//
// Which keys a query at position i sees is an interval [low(i), high(i)), both ends growing with i; tiles outside are not
// visited. Sums that many blocks of queries add to take them in one order, whoever comes first: the result is the same for
// any number of threads.

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include "vectors.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr Index ROWS = 128;    // queries in a tile
constexpr Index COLUMNS = 128; // keys in a tile
constexpr Index GRAIN = 32;    // tiles at an end are rounded up to multiples of it
constexpr Index LINE = 16;     // floats in a cache line
constexpr Index PITCH = ROWS + LINE; // floats from one row of a tile to the next: not a power of two, which would share sets
constexpr Index WORKSPACE = Index(2) << 20; // floats that the heads in work take together, at most, if there are more than threads
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
constexpr float LOWEST = -1e30f; // stands in for the maximum over no score
static_assert(ROWS % LINE == 0 && LINE % WIDTH == 0 && GRAIN % LINE == 0, "vectors fill a tile's rows");

Index round_up(Index n, Index step) { return (n + step - 1) / step * step; }

} // namespace

extern "C" {

// One attention problem, as native.py fills it in. Strides are those of batch, head and token, in elements; the last axis
// is contiguous. q (B,H,T,D), k (B,Hkv,S,D), v (B,Hkv,S,Dv), out and grad (B,H,T,Dv), lse and grad_lse (B,H,T).
struct Problem {
  int64_t B, H, Hkv, T, S, D, Dv;
  int64_t bf16;           // operands are bf16, not fp32
  int64_t dot_products;   // the processor multiplies bf16 itself: oneDNN's kernels, else those below
  float scale;
  const void *q, *k, *v;
  void *out;
  float *lse;
  int64_t q_stride[3], k_stride[3], v_stride[3], out_stride[3];
  const int64_t *low, *high; // (T) each: the keys that a query sees
  const int64_t *lengths;    // (B), or null: keys from there on are padding
  // The bias of the distance alone, or null: line (H or 1, length) begins at distance `first`.
  const float *line;
  int64_t line_heads, line_length, line_first;
  int64_t tail;              // from this distance on the line is 0
  // The bias a + s u + sum of bends relu(u - knot), u = psi[i - j] / normalizer[i], or null.
  const float *psi, *inverse;  // (pad + S + pad) ascending, 0 before distance 0; (T): 1 / normalizer
  const float *knots;          // (K) ascending
  const float *straight;       // (H, K + 1, 2): intercept and slope where so many knots are passed
  const float *bends;          // (H, K)
  int64_t K, pad;
  // The bias f[i] - f[j], or null.
  const double *f;           // (B, H, S)
  // Backward alone.
  const void *grad;
  const float *grad_lse;
  void *dq, *dk, *dv;
  int64_t grad_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  float *d_line;             // (B, H, length), zeroed, or null
  float *d_psi, *d_inverse;  // (B, H, pad + S + pad), zeroed; (B, H, T)
  double *d_pieces;          // (B, H, 4, K + 1), zeroed: see Piecewise
  float *d_later, *d_earlier; // (B, H, T) of f[i], (B, H, S) of -f[j], zeroed
};
}

namespace {

// ---- numbers -------------------------------------------------------------------------------------------------------

inline float bits_to_float(uint32_t x) { float y; std::memcpy(&y, &x, 4); return y; }

// Two vectors rounded to bf16 (nearest, ties to even): one after the other, or a word a column, the first in the lower half.
#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
inline __m512i narrowed(Floats first, Floats second) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)); }
inline void store_narrow(BFloat16 *to, Floats first, Floats second) { _mm512_storeu_si512(to, narrowed(first, second)); }
inline void store_narrow(BFloat16 *to, Floats x) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))); }
inline Words paired(Floats first, Floats second) {
  const __m512i columns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(columns, narrowed(first, second));
}
#else
inline void store_narrow(BFloat16 *to, Floats first, Floats second) { at::vec::convert_from_float<BFloat16>(first, second).store(to); }
inline void store_narrow(BFloat16 *to, Floats x) { at::vec::convert_from_float<BFloat16>(x, Floats(0.f)).store(to, WIDTH); }
inline Words paired(Floats first, Floats second) {
  const Words half(0x7fff), one(1), low(0xffff), high(static_cast<int32_t>(0xffff0000u));
  Words a = at::vec::cast<int32_t>(first), b = at::vec::cast<int32_t>(second);
  a = a + half + ((a >> Words(16)) & one);
  b = b + half + ((b >> Words(16)) & one);
  return ((a >> Words(16)) & low) | (b & high);
}
#endif

// ---- products ------------------------------------------------------------------------------------------------------

// R rows of C vectors of A B, for B in pairs of rows (word k/2, column j): bf16 without hardware for it.
template <int R, int C>
inline void multiply_pairs(Index K, const BFloat16 *a, Index lda, const uint32_t *b, Index ldb, float *c, Index ldc, bool add) {
  Floats sum[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) sum[r][j] = add ? Floats::loadu(c + r * ldc + j * WIDTH) : Floats(0.f);
  const Words high(static_cast<int32_t>(0xffff0000u));
  for (Index k = 0; k < K; k += 2) {
    Floats even[C], odd[C];
    for (int j = 0; j < C; j++) {
      const Words pair = Words::loadu(reinterpret_cast<const int32_t *>(b + k / 2 * ldb + j * WIDTH));
      even[j] = at::vec::cast<float>(pair << Words(16));
      odd[j] = at::vec::cast<float>(pair & high);
    }
    for (int r = 0; r < R; r++) {
      const Floats first(static_cast<float>(a[r * lda + k])), second(static_cast<float>(a[r * lda + k + 1]));
      for (int j = 0; j < C; j++)
        sum[r][j] = at::vec::fmadd(second, odd[j], at::vec::fmadd(first, even[j], sum[r][j]));
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) sum[r][j].store(c + r * ldc + j * WIDTH);
}

template <int C>
void multiply_columns(Index M, Index K, const BFloat16 *a, Index lda, const uint32_t *b, Index ldb, float *c, Index ldc, bool add) {
  Index i = 0;
  for (; i + 4 <= M; i += 4) multiply_pairs<4, C>(K, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i < M; i++) multiply_pairs<1, C>(K, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
}

// What stands between the two dtypes: how B is packed, and who multiplies. C (M,N) fp32 = or += A (M,K) B (K,N).
struct Single {
  using Number = float;
  static constexpr Index PAIR = 1; // rows of B to a word
  static constexpr float UNIT = 1.f; // a nat, in what scores are counted in for `weight`

  static Floats weight(Floats x) { return exponential(x); }

  void multiply(Index M, Index N, Index K, const float *a, Index lda, const float *b, Index ldb, float *c, Index ldc, bool add) const {
    at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b, c, false);
  }
  Index rounded(Index columns) const { return columns; }
  void release() const {}
};

struct Half {
  using Number = BFloat16;
  static constexpr Index PAIR = 2;
  static constexpr float UNIT = LOG2_E;
  bool library;

  static Floats weight(Floats x) { return power_of_two(x); }

  void multiply(Index M, Index N, Index K, const BFloat16 *a, Index lda, const BFloat16 *b, Index ldb, float *c, Index ldc, bool add) const {
    if (library) {
      at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, add, a, b, c, true);
      return;
    }
    const uint32_t *words = reinterpret_cast<const uint32_t *>(b);
    Index j = 0;
    for (; j + 2 * WIDTH <= N; j += 2 * WIDTH) multiply_columns<2>(M, K, a, lda, words + j, ldb, c + j, ldc, add);
    for (; j < N; j += WIDTH) multiply_columns<1>(M, K, a, lda, words + j, ldb, c + j, ldc, add);
  }
  // Columns of B as they have to be there: our own products take whole vectors.
  Index rounded(Index columns) const { return library ? columns : round_up(columns, WIDTH); }
  void release() const {
    if (library) at::native::cpublas::brgemm_release(true);
  }
};

// B = X' for X (n, d) with a stride: B (d, pitch), columns from n to `columns` zero. d even where rows are paired.
inline void pack_transposed(float *to, Index pitch, Index columns, const float *x, Index stride, Index n, Index d) {
  for (Index i0 = 0; i0 < columns; i0 += 8) // a few columns at a time: whole lines of both sides are used while they are near
    for (Index c = 0; c < d; c++)
      for (Index i = i0; i < i0 + 8; i++) to[c * pitch + i] = i < n ? x[i * stride + c] : 0.f;
}
inline void pack_transposed(BFloat16 *to, Index pitch, Index columns, const BFloat16 *x, Index stride, Index n, Index d) {
  uint32_t *words = reinterpret_cast<uint32_t *>(to);
  for (Index i0 = 0; i0 < columns; i0 += 8)
    for (Index c = 0; c < d / 2; c++)
      for (Index i = i0; i < i0 + 8; i++) {
        uint32_t word = 0;
        if (i < n) std::memcpy(&word, x + i * stride + 2 * c, 4);
        words[c * pitch + i] = word;
      }
}

// B = X for X (n, d): B (rows, pitch) with rows from n on zero, and columns from d to pitch.
inline void pack(float *to, Index pitch, Index rows, const float *x, Index stride, Index n, Index d) {
  for (Index i = 0; i < rows; i++) {
    const Index filled = i < n ? d : 0;
    if (filled) std::memcpy(to + i * pitch, x + i * stride, d * sizeof(float));
    std::fill(to + i * pitch + filled, to + (i + 1) * pitch, 0.f);
  }
}
inline void pack(BFloat16 *to, Index pitch, Index rows, const BFloat16 *x, Index stride, Index n, Index d) {
  const uint16_t *from = reinterpret_cast<const uint16_t *>(x);
  uint32_t *words = reinterpret_cast<uint32_t *>(to);
  for (Index i = 0; i < rows; i += 2)
    for (Index c = 0; c < pitch; c++) {
      const uint32_t low = i < n && c < d ? from[i * stride + c] : 0, high = i + 1 < n && c < d ? from[(i + 1) * stride + c] : 0;
      words[i / 2 * pitch + c] = low | high << 16;
    }
}

// X' for X (n, d) as it lies, (d, columns): the A of a product.
template <typename Number>
void transpose(Number *to, Index columns, const Number *x, Index stride, Index n, Index d) {
  for (Index i0 = 0; i0 < columns; i0 += 8)
    for (Index c = 0; c < d; c++)
      for (Index i = i0; i < i0 + 8; i++) to[c * columns + i] = i < n ? x[i * stride + c] : Number(0.f);
}

// ---- memory and order ----------------------------------------------------------------------------------------------

// Memory of one owner, aligned to cache lines, not initialized.
template <typename Number>
class Buffer {
 public:
  explicit Buffer(Index n) : data_(static_cast<Number *>(::operator new(std::max<Index>(n, 1) * sizeof(Number), std::align_val_t(64)))) {}
  Buffer(const Buffer &) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  operator Number *() const { return data_; }

 private:
  Number *data_;
};

// Work handed out one piece after the other, in their order, to as many threads as there are.
class Shift {
 public:
  explicit Shift(Index n) : n_(n) {}

  Index next() { // -1: no more
    const Index mine = next_.fetch_add(1);
    return mine < n_ && !stopped_ ? mine : Index(-1);
  }
  // Waits for its turn. Whoever comes before has been handed out before, and so is at work, unless it has failed.
  void await(const std::atomic<Index> &counter, Index turn) const {
    for (Index spins = 0; counter.load(std::memory_order_acquire) != turn; spins++) {
      if (stopped_) throw std::runtime_error("another thread has failed");
      if (spins > 100) std::this_thread::yield();
    }
  }
  void stop() { stopped_ = true; }

 private:
  const Index n_;
  std::atomic<Index> next_{0};
  std::atomic<bool> stopped_{false};
};

template <typename Work>
void share(Index n, const Work &work) {
  Shift shift(n);
  at::parallel_for(0, std::min<Index>(at::get_num_threads(), n), 1, [&](Index, Index) {
    try {
      work(shift);
    } catch (...) {
      shift.stop();
      throw;
    }
  });
}

// ---- the problem in blocks -----------------------------------------------------------------------------------------

struct Interval { Index first, stop; };

// Who sees whom, in blocks of queries and of keys.
class Blocks {
 public:
  explicit Blocks(const Problem &p) : p(p), rows((p.T + ROWS - 1) / ROWS), columns((p.S + COLUMNS - 1) / COLUMNS) {}

  Index low(Index t) const { return p.low[t]; }
  Index high(Index b, Index t) const { return p.lengths ? std::min(p.high[t], p.lengths[b]) : p.high[t]; }
  Index row_stop(Index x) const { return std::min(p.T, (x + 1) * ROWS); }
  Index column_stop(Index c) const { return std::min(p.S, (c + 1) * COLUMNS); }
  // Keys in a block's tiles, rounded up at the end.
  Index width(Index c) const { return round_up(column_stop(c) - c * COLUMNS, GRAIN); }
  // The blocks of keys that some query of block x may see.
  Interval seen(Index b, Index x) const {
    const Index first = low(x * ROWS), stop = high(b, row_stop(x) - 1);
    if (first >= stop) return {0, 0};
    return {first / COLUMNS, (stop + COLUMNS - 1) / COLUMNS};
  }
  bool whole(Index b, Index x, Index c) const {
    return low(row_stop(x) - 1) <= c * COLUMNS && c * COLUMNS + width(c) <= high(b, x * ROWS);
  }
  // Writes -inf where a key of block c is hidden from a query of block x.
  void hide(float *tile, Index b, Index x, Index c) const {
    const Index t0 = x * ROWS, n = row_stop(x) - t0, padded = round_up(n, LINE);
    Index begin = 0, end = 0; // of the queries that see the key: both grow with the key
    for (Index j = 0; j < width(c); j++) {
      const Index key = c * COLUMNS + j;
      while (end < n && low(t0 + end) <= key) end++;
      while (begin < n && high(b, t0 + begin) <= key) begin++;
      float *row = tile + j * PITCH;
      const Index until = std::min(begin, n), from = std::max(std::max(end, begin), Index(0));
      std::fill(row, row + until, HIDDEN);
      std::fill(row + std::min(from, n), row + padded, HIDDEN);
    }
  }

  const Problem &p;
  Index rows, columns;
};

template <typename Number>
inline const Number *at_token(const void *base, const int64_t *stride, Index b, Index h, Index t) {
  return static_cast<const Number *>(base) + b * stride[0] + h * stride[1] + t * stride[2];
}
template <typename Number>
inline Number *at_token(void *base, const int64_t *stride, Index b, Index h, Index t) {
  return static_cast<Number *>(base) + b * stride[0] + h * stride[1] + t * stride[2];
}

// A block of keys or values as the A of a product: as it lies, or where the block is rounded up, a copy with zeros.
template <typename Number>
struct Operand {
  const Number *data;
  Index stride;
};
template <typename Number>
Operand<Number> padded_rows(const Number *x, Index stride, Index n, Index rows, Index d, Number *copy) {
  if (n == rows) return {x, stride};
  for (Index i = 0; i < rows; i++) {
    if (i < n) std::memcpy(copy + i * d, x + i * stride, d * sizeof(Number));
    else std::fill(copy + i * d, copy + (i + 1) * d, Number(0.f));
  }
  return {copy, d};
}

// Sums of rows that lie shifted against one another by one float a row, as the distances of a tile do. Rows whose shifts
// differ by whole vectors go to one of WIDTH lines, in whose terms they are the same pieces.
class Diagonals {
 public:
  void add(Index j, Index t, Floats x) {
    float *at = piece(j % WIDTH, t - j / WIDTH * WIDTH);
    (Floats::loadu(at) + x).store(at);
  }
  // All of line r at once, from columns that are `shift` ahead of the first of its rows.
  void put(Index r, Index shift, Floats x) { x.store(piece(r, shift)); }
  // line[t - j] += the sum over all rows j and columns t.
  void take(float *line, Index rows, Index columns) const {
    for (Index r = 0; r < std::min(WIDTH, rows); r++) {
      const Index first = COLUMNS - (rows - 1 - r) / WIDTH * WIDTH;
      for (Index n = first; n < COLUMNS + columns; n++) line[n - COLUMNS - r] += sums_[r][n];
    }
  }

 private:
  static constexpr Index LENGTH = COLUMNS + ROWS;
  float *piece(Index r, Index shift) { return &sums_[r][COLUMNS + shift]; }
  alignas(64) float sums_[WIDTH][LENGTH];
};

// Where a tile lies, and its bias: `line`, from the distance of the first query to the first key on, times `gain` of the query
// where there is one, and `level` added to all; or a number of the query and one of the key; or none.
struct Tile {
  Index b, h, x, c;
  Index rows, columns; // keys and queries, rounded up
  Index distance;      // of the first query to the first key
  const float *line = nullptr;
  const float *gain = nullptr; // (columns)
  float level = 0.f;
  const float *later = nullptr, *earlier = nullptr; // (columns), (rows)

  enum Bias { NONE, LINE, GAINED, SUM };
  Bias bias() const { return gain ? GAINED : line ? LINE : later ? SUM : NONE; }
};

// FoX's bias f[i] - f[j]. Counted from the tile's first query on, numbers near the diagonal are small before they are rounded.
class Difference {
 public:
  explicit Difference(const Problem &p) : p(p) {}

  void enter(Tile &tile) {
    const Index t0 = tile.x * ROWS, j0 = tile.c * COLUMNS;
    const double *keys = p.f + (tile.b * p.H + tile.h) * p.S, *queries = keys + p.S - p.T + t0;
    const double here = queries[0];
    for (Index t = 0; t < tile.columns; t++) later_[t] = t0 + t < p.T ? static_cast<float>(queries[t] - here) : 0.f;
    for (Index j = 0; j < tile.rows; j++) earlier_[j] = j0 + j < p.S ? static_cast<float>(here - keys[j0 + j]) : 0.f;
    tile.later = later_, tile.earlier = earlier_;
  }
  void clear() { std::fill(d_later_, d_later_ + ROWS, 0.f); }
  float *d_later() { return d_later_; }     // of a block of queries, so far
  float *d_earlier() { return d_earlier_; } // of the last tile

 private:
  const Problem &p;
  alignas(64) float later_[ROWS], earlier_[COLUMNS], d_later_[ROWS], d_earlier_[COLUMNS];
};

// FIRE's bias: psi times what belongs to the query, with the slope and the level of the piece where the tile's least u lies;
// squares of it where further knots are passed have more on top.
class Piecewise {
 public:
  explicit Piecewise(const Problem &p) : p(p), sums_(4 * (p.K + 1), 0.0) {}

  // The line of a tile. What is asked for later is of the tile that was the last here.
  void enter(Tile &tile) {
    const Index t0 = tile.x * ROWS, n = std::min(ROWS, p.T - t0), vectors = tile.columns / WIDTH;
    if (tile.x != x_) {
      x_ = tile.x;
      for (Index i = 0; i < ROWS; i++) by_[i] = p.inverse[t0 + std::min(i, n - 1)];
      for (Index t = 0; t < ROWS; t += WIDTH) {
        const auto [least, most] = std::minmax_element(by_ + t, by_ + t + WIDTH);
        least_[t / WIDTH] = *least, most_[t / WIDTH] = *most;
      }
    }
    const float low = psi(tile.distance - tile.rows + 1) * *std::min_element(least_, least_ + vectors);
    const float high = psi(tile.distance + tile.columns - 1) * *std::max_element(most_, most_ + vectors);
    first_ = std::upper_bound(p.knots, p.knots + p.K, low) - p.knots;
    last_ = std::max<Index>(std::lower_bound(p.knots, p.knots + p.K, high) - p.knots, first_);
    pieces_ = p.straight + tile.h * (p.K + 1) * 2, bends_ = p.bends + tile.h * p.K;
    for (Index t = 0; t < tile.columns; t += WIDTH) (Floats::loadu(by_ + t) * Floats(slope(first_))).store(gain_ + t);
    tile.line = p.psi + p.pad + tile.distance, tile.gain = gain_, tile.level = level(first_);
  }

  // Adds what the line leaves out to scores, which are multiplied by `scale` later.
  void bend(const Tile &tile, float scale, float *scores) const {
    if (first_ == last_) return;
    const Floats rate(1.f / scale);
    squares(tile, [&](const Square &at) {
      if (at.stop == first_) return;
      const Floats more((level(at.passed) - level(first_)) / scale), steeper = Floats((slope(at.passed) - slope(first_)) / scale) * at.by;
      for (Index j = at.j0; j < at.j1; j++) {
        float *score = scores + j * PITCH + at.t;
        const Floats psi = distances(tile, j, at.t);
        Floats sum = at::vec::fmadd(steeper, psi, more);
        for (Index k = at.passed; k < at.stop; k++)
          sum = at::vec::fmadd(Floats(bends_[k]) * rate, at::vec::clamp_min(at::vec::fmsub(psi, at.by, Floats(p.knots[k])), Floats(0.f)), sum);
        (Floats::loadu(score) + sum).store(score);
      }
    });
  }

  // Takes the gradient of a tile's scores: of 1 / normalizer down the columns, of the pieces, and of psi along the diagonals
  // what the line leaves out.
  void collect(const Tile &tile, const float *ds, Diagonals &diagonals, float *d_inverse) {
    Floats total(0.f), moment(0.f); // of ds and of ds u, where `piece` knots are passed
    Index piece = first_;
    const auto leave = [&](Index next) {
      sums_[piece] += sum(total);
      sums_[p.K + 1 + piece] += sum(moment);
      piece = next, total = moment = Floats(0.f);
    };
    squares(tile, [&](const Square &at) {
      if (at.passed != piece) leave(at.passed);
      Floats all(0.f), along(0.f);
      for (Index j = at.j0; j < at.j1; j++) {
        const Floats g = Floats::loadu(ds + j * PITCH + at.t);
        all = all + g;
        along = at::vec::fmadd(g, distances(tile, j, at.t), along);
      }
      total = total + all;
      moment = at::vec::fmadd(along, at.by, moment);
      Floats d_by = along * Floats(slope(at.passed));
      if (at.passed != first_) {
        const Floats steeper = Floats(slope(at.passed) - slope(first_)) * at.by;
        for (Index j = at.j0; j < at.j1; j++) diagonals.add(j, at.t, Floats::loadu(ds + j * PITCH + at.t) * steeper);
      }
      for (Index k = at.passed; k < at.stop; k++) {
        const Floats knot(p.knots[k]), bend(bends_[k]), steeper = bend * at.by;
        Floats hinge(0.f), beyond(0.f), by(0.f);
        for (Index j = at.j0; j < at.j1; j++) {
          const Floats psi = distances(tile, j, at.t), over = at::vec::fmsub(psi, at.by, knot);
          const Floats g = Floats::loadu(ds + j * PITCH + at.t) & (over > Floats(0.f));
          beyond = beyond + g;
          hinge = at::vec::fmadd(g, over, hinge);
          by = at::vec::fmadd(g, psi, by);
          diagonals.add(j, at.t, g * steeper);
        }
        d_by = at::vec::fmadd(by, bend, d_by);
        sums_[2 * (p.K + 1) + k] += sum(hinge);
        sums_[3 * (p.K + 1) + k] += sum(beyond);
      }
      (Floats::loadu(d_inverse + at.t) + d_by).store(d_inverse + at.t);
    });
    leave(first_);
  }
  std::vector<double> &sums() { return sums_; }

 private:
  static constexpr Index SIDE = 16;

  struct Square {
    Index j0, j1, t;     // rows, and the first of a vector of columns
    Index passed, stop;  // knots below all of its u, and up to where there are some among them
    Floats by;           // 1 / normalizer
  };

  template <typename Use>
  void squares(const Tile &tile, const Use &use) const {
    for (Index t = 0; t < tile.columns; t += WIDTH) {
      const Floats by = Floats::loadu(by_ + t);
      Index stop = last_;
      for (Index j0 = 0; j0 < tile.rows; j0 += SIDE) { // u falls from one to the next, and with it what is passed
        const Index j1 = std::min(j0 + SIDE, tile.rows);
        const float low = psi(tile.distance - (j1 - 1) + t) * least_[t / WIDTH], high = psi(tile.distance - j0 + t + WIDTH - 1) * most_[t / WIDTH];
        while (stop > first_ && p.knots[stop - 1] >= high) stop--;
        Index passed = stop;
        while (passed > first_ && p.knots[passed - 1] > low) passed--;
        use({j0, j1, t, passed, stop, by});
      }
    }
  }
  float level(Index passed) const { return pieces_[2 * passed]; }
  float slope(Index passed) const { return pieces_[2 * passed + 1]; }
  float psi(Index distance) const { return p.psi[p.pad + std::max<Index>(distance, 0)]; }
  Floats distances(const Tile &tile, Index j, Index t) const { return Floats::loadu(p.psi + p.pad + tile.distance - j + t); }
  static double sum(Floats x) {
    alignas(64) float each[WIDTH];
    x.store(each);
    double all = 0;
    for (Index n = 0; n < WIDTH; n++) all += each[n];
    return all;
  }

  const Problem &p;
  std::vector<double> sums_;
  const float *pieces_ = nullptr, *bends_ = nullptr; // of the head
  Index x_ = -1, first_ = 0, last_ = 0; // knots passed by the tile's least u, and by its largest
  alignas(64) float by_[ROWS], gain_[ROWS]; // 1 / normalizer (where no query is, the last one's), and times the slope
  float least_[ROWS / WIDTH], most_[ROWS / WIDTH]; // of a vector of the former
};

Tile tile_at(const Problem &p, const Blocks &blocks, Index b, Index h, Index x, Index c, Piecewise *piecewise, Difference *difference) {
  Tile tile{b, h, x, c, blocks.width(c), round_up(blocks.row_stop(x) - x * ROWS, LINE), p.S - p.T + x * ROWS - c * COLUMNS};
  if (p.line != nullptr && tile.distance - (blocks.column_stop(c) - c * COLUMNS) + 1 < p.tail)
    tile.line = p.line + (p.line_heads == 1 ? 0 : h) * p.line_length + tile.distance - p.line_first;
  else if (piecewise != nullptr)
    piecewise->enter(tile);
  else if (difference != nullptr)
    difference->enter(tile);
  return tile;
}

// How many heads of keys and values are in work together: one a thread, or as many as fit a small workspace.
Index heads_together(const Problem &p, Index floats_a_head) {
  return std::min(p.B * p.Hkv, std::max<Index>(at::get_num_threads(), WORKSPACE / std::max<Index>(floats_a_head, 1)));
}

// ---- forward -------------------------------------------------------------------------------------------------------

// P' from S', column by column: the running maximum (in the format's units) and sum go on, `decay` is what earlier sums
// shrink by. P' takes the place of S', or its pairs of rows are written to `packed` where B is made of pairs.
template <typename Format, Tile::Bias bias>
bool soften(const Tile &tile, float scale, float *scores, uint32_t *packed, float *top, float *total, float *decay) {
  const Floats factor(scale * Format::UNIT), unit(Format::UNIT);
  bool shrinks = false;
  for (Index t = 0; t < tile.columns; t += WIDTH) {
    const Floats level = (bias == Tile::SUM ? Floats::loadu(tile.later + t) : Floats(tile.level)) * unit;
    const Floats rate = (bias == Tile::GAINED ? Floats::loadu(tile.gain + t) : Floats(1.f)) / Floats(scale);
    const auto score = [&](Index j) { // over scale, without the level
      const Floats s = Floats::loadu(scores + j * PITCH + t);
      if constexpr (bias == Tile::SUM) return at::vec::fmadd(Floats(tile.earlier[j]), rate, s);
      else if constexpr (bias != Tile::NONE) return at::vec::fmadd(Floats::loadu(tile.line - j + t), rate, s);
      else return s;
    };
    Floats most(HIDDEN), other(HIDDEN);
    for (Index j = 0; j < tile.rows; j += 2) {
      most = at::vec::clamp_min(score(j), most);
      other = at::vec::clamp_min(score(j + 1), other);
    }
    const Floats before = Floats::loadu(top + t);
    most = at::vec::maximum(at::vec::fmadd(at::vec::maximum(most, other), factor, level), before);
    const Floats shrink = Format::weight(before - most), less = level - most;
    Floats sum(0.f), sums(0.f);
    for (Index j = 0; j < tile.rows; j += 2) {
      const Floats s = Format::weight(at::vec::fmadd(score(j), factor, less));
      const Floats r = Format::weight(at::vec::fmadd(score(j + 1), factor, less));
      sum = sum + s;
      sums = sums + r;
      if constexpr (Format::PAIR == 2) {
        paired(s, r).store(packed + j / 2 * PITCH + t);
      } else {
        s.store(scores + j * PITCH + t);
        r.store(scores + (j + 1) * PITCH + t);
      }
    }
    at::vec::fmadd(Floats::loadu(total + t), shrink, sum + sums).store(total + t);
    most.store(top + t);
    shrink.store(decay + t);
    shrinks = shrinks || (shrink != Floats(1.f)).zero_mask() != (1 << WIDTH) - 1;
  }
  return shrinks;
}

template <typename Format>
void forward(const Problem &p, const Format &format) {
  using Number = typename Format::Number;
  const Blocks blocks(p);
  const Index keys = round_up(p.S, GRAIN), last = blocks.columns - 1;
  const Index tail = last * COLUMNS; // the first key of the last block, which is rounded up
  const Index group = p.H / p.Hkv, wave = heads_together(p, keys * p.Dv * Index(sizeof(Number)) / 4);
  Buffer<Number> values(wave * keys * p.Dv), ends(wave * COLUMNS * p.D);
  for (Index first = 0; first < p.B * p.Hkv; first += wave) {
    const Index n = std::min(wave, p.B * p.Hkv - first);
    const auto end_of = [&](Index w) {
      const Index b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv;
      return padded_rows(at_token<Number>(p.k, p.k_stride, b, kv, tail), p.k_stride[2], p.S - tail, blocks.width(last), p.D, ends + w * COLUMNS * p.D);
    };
    share(n * blocks.columns, [&](Shift &shift) {
      for (Index job; (job = shift.next()) >= 0;) {
        const Index w = job / blocks.columns, c = job % blocks.columns, b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv;
        transpose(values + w * keys * p.Dv + c * COLUMNS * p.Dv, blocks.width(c), at_token<Number>(p.v, p.v_stride, b, kv, c * COLUMNS),
                  p.v_stride[2], blocks.column_stop(c) - c * COLUMNS, p.Dv);
        if (c == last) end_of(w);
      }
    });
    share(blocks.rows * group * n, [&](Shift &shift) {
      Buffer<float> scores(COLUMNS * PITCH), mean(p.Dv * PITCH), top(ROWS), total(ROWS), decay(ROWS);
      Buffer<Number> queries(round_up(p.D, 2) * PITCH), weights(Format::PAIR == 2 ? COLUMNS * PITCH : 0);
      std::unique_ptr<Piecewise> piecewise(p.psi ? new Piecewise(p) : nullptr);
      std::unique_ptr<Difference> difference(p.f ? new Difference(p) : nullptr);
      for (Index job; (job = shift.next()) >= 0;) {
        const Index w = job % n, g = job / n % group, x = blocks.rows - 1 - job / (n * group); // the longest rows first
        const Index b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv, h = kv * group + g;
        const Index t0 = x * ROWS, m = blocks.row_stop(x) - t0, columns = round_up(m, LINE);
        const Interval seen = blocks.seen(b, x);
        pack_transposed(queries, PITCH, columns, at_token<Number>(p.q, p.q_stride, b, h, t0), p.q_stride[2], m, p.D);
        std::fill(top + 0, top + ROWS, LOWEST);
        std::fill(total + 0, total + ROWS, 0.f);
        for (Index c = seen.first; c < seen.stop; c++) {
          const Tile tile = tile_at(p, blocks, b, h, x, c, piecewise.get(), difference.get());
          Operand<Number> k{at_token<Number>(p.k, p.k_stride, b, kv, c * COLUMNS), p.k_stride[2]};
          if (c == last && tile.rows != p.S - tail) k = {ends + w * COLUMNS * p.D, p.D};
          format.multiply(tile.rows, columns, p.D, k.data, k.stride, queries, PITCH, scores, PITCH, false);
          if (piecewise) piecewise->bend(tile, p.scale, scores);
          if (!blocks.whole(b, x, c)) blocks.hide(scores, b, x, c);
          uint32_t *packed = reinterpret_cast<uint32_t *>(static_cast<Number *>(weights));
          constexpr bool pairs = Format::PAIR == 2;
          constexpr decltype(&soften<Format, Tile::NONE>) by_bias[] = {
              soften<Format, Tile::NONE>, soften<Format, Tile::LINE>, soften<Format, Tile::GAINED>, soften<Format, Tile::SUM>};
          const bool shrinks = by_bias[tile.bias()](tile, p.scale, scores, packed, top, total, decay);
          const bool adds = c > seen.first;
          if (adds && shrinks)
            for (Index d = 0; d < p.Dv; d++)
              for (Index t = 0; t < columns; t += WIDTH)
                (Floats::loadu(mean + d * PITCH + t) * Floats::loadu(decay + t)).store(mean + d * PITCH + t);
          const Number *product;
          if constexpr (pairs) product = weights; else product = scores;
          format.multiply(p.Dv, columns, tile.rows, values + w * keys * p.Dv + c * COLUMNS * p.Dv, tile.rows, product, PITCH, mean, PITCH, adds);
        }
        for (Index t = 0; t < m; t++) {
          const bool any = seen.first < seen.stop && total[t] > 0.f;
          Number *out = at_token<Number>(p.out, p.out_stride, b, h, t0 + t);
          const float share_of = any ? 1.f / total[t] : 0.f;
          for (Index d = 0; d < p.Dv; d++) out[d] = static_cast<Number>(any ? mean[d * PITCH + t] * share_of : 0.f);
          p.lse[(b * p.H + h) * p.T + t0 + t] = any ? top[t] / Format::UNIT + std::log(total[t]) : HIDDEN;
        }
      }
      format.release();
    });
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// P' and dS' of a tile from S' and A': in place where B is made as A is, else as rows in the operands' dtype, dS' in pairs of
// rows too, and in place where `keeps`. `norm` is the log-sum-exp in the format's units; diagonals are those of the line, and
// `difference` takes the sums of rows and columns.
template <typename Format, Tile::Bias bias>
void differentiate(const Tile &tile, float scale, float *scores, float *products, const float *norm, const float *delta,
                   typename Format::Number *weights, typename Format::Number *gradient, uint32_t *packed, Diagonals *diagonals, Difference *difference, bool keeps) {
  constexpr bool pairs = Format::PAIR == 2;
  const Floats factor(scale * Format::UNIT), unit(Format::UNIT);
  alignas(64) float less[ROWS], gain[ROWS];
  for (Index t = 0; t < tile.columns; t += WIDTH) {
    (Floats::loadu(norm + t) - (bias == Tile::SUM ? Floats::loadu(tile.later + t) : Floats(tile.level)) * unit).store(less + t);
    if constexpr (bias == Tile::GAINED) (Floats::loadu(tile.gain + t) * unit).store(gain + t);
  }
  const auto at = [&](Index j, Index t, Floats &weight) {
    Floats s = at::vec::fmsub(Floats::loadu(scores + j * PITCH + t), factor, Floats::loadu(less + t));
    if constexpr (bias == Tile::SUM) s = at::vec::fmadd(Floats(tile.earlier[j]), unit, s);
    else if constexpr (bias != Tile::NONE) s = at::vec::fmadd(Floats::loadu(tile.line - j + t), bias == Tile::GAINED ? Floats::loadu(gain + t) : unit, s);
    weight = Format::weight(s);
    const Floats ds = weight * (Floats::loadu(products + j * PITCH + t) - Floats::loadu(delta + t));
    if constexpr (!pairs) weight.store(scores + j * PITCH + t);
    if (!pairs || keeps) ds.store(products + j * PITCH + t);
    return ds;
  };
  if (diagonals) { // along them, so that their sums stay at hand
    for (Index r = 0; r < WIDTH; r += 2)
      for (Index shift = WIDTH - tile.rows; shift < tile.columns; shift += WIDTH) {
        Floats even(0.f), odd(0.f);
        for (Index t = std::max<Index>(shift, 0); t < std::min(tile.columns, shift + tile.rows); t += WIDTH) {
          const Index j = r + t - shift;
          Floats weight[2];
          const Floats ds = at(j, t, weight[0]), other = at(j + 1, t, weight[1]);
          if constexpr (bias == Tile::GAINED) {
            even = at::vec::fmadd(ds, Floats::loadu(tile.gain + t), even);
            odd = at::vec::fmadd(other, Floats::loadu(tile.gain + t), odd);
          } else {
            even = even + ds;
            odd = odd + other;
          }
          if constexpr (pairs) {
            store_narrow(weights + j * PITCH + t, weight[0]);
            store_narrow(weights + (j + 1) * PITCH + t, weight[1]);
            store_narrow(gradient + j * PITCH + t, ds);
            store_narrow(gradient + (j + 1) * PITCH + t, other);
            paired(ds, other).store(packed + j / 2 * PITCH + t);
          }
        }
        diagonals->put(r, shift, even);
        diagonals->put(r + 1, shift, odd);
      }
  } else {
    for (Index j = 0; j < tile.rows; j += 2) {
      Floats along[2] = {Floats(0.f), Floats(0.f)};
      for (Index t = 0; t < tile.columns; t += 2 * WIDTH) {
        const bool more = t + WIDTH < tile.columns;
        Floats ds[2][2];
        for (Index r = 0; r < 2; r++) {
          Floats weight, other(0.f);
          ds[r][0] = at(j + r, t, weight);
          ds[r][1] = more ? at(j + r, t + WIDTH, other) : Floats(0.f);
          if constexpr (pairs) {
            store_narrow(weights + (j + r) * PITCH + t, weight, other);
            store_narrow(gradient + (j + r) * PITCH + t, ds[r][0], ds[r][1]);
          }
        }
        if constexpr (pairs)
          for (Index i = 0; i < 2; i++) paired(ds[0][i], ds[1][i]).store(packed + j / 2 * PITCH + t + i * WIDTH);
        if (bias == Tile::SUM && difference) {
          for (Index r = 0; r < 2; r++) along[r] = along[r] + ds[r][0] + ds[r][1];
          for (Index i = 0; i < 1 + more; i++) {
            float *down = difference->d_later() + t + i * WIDTH;
            (Floats::loadu(down) + ds[0][i] + ds[1][i]).store(down);
          }
        }
      }
      if (bias == Tile::SUM && difference)
        for (Index r = 0; r < 2; r++) difference->d_earlier()[j + r] = total(along[r]);
    }
  }
}

template <typename Format>
void backward(const Problem &p, const Format &format) {
  using Number = typename Format::Number;
  constexpr bool pairs = Format::PAIR == 2;
  const Blocks blocks(p);
  const Index keys = round_up(p.S, GRAIN), last = blocks.columns - 1, tail = last * COLUMNS;
  const bool rounded = blocks.width(last) != p.S - tail;
  const Index group = p.H / p.Hkv, D = format.rounded(p.D), Dv = format.rounded(p.Dv), wide = D + Dv;
  const Index wave = heads_together(p, keys * (wide + p.D * Index(sizeof(Number)) / 4));
  Buffer<float> sums(wave * keys * wide); // of dK, then of dV, for each head
  Buffer<Number> turned(wave * keys * p.D), ends(wave * COLUMNS * wide);
  std::vector<std::atomic<Index>> turns(wave * blocks.columns), lines(wave * group);
  for (Index first = 0; first < p.B * p.Hkv; first += wave) {
    const Index n = std::min(wave, p.B * p.Hkv - first);
    for (auto &turn : turns) turn = 0;
    for (auto &turn : lines) turn = 0;
    share(n * blocks.columns, [&](Shift &shift) {
      for (Index job; (job = shift.next()) >= 0;) {
        const Index w = job / blocks.columns, c = job % blocks.columns, b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv;
        const Index rows = blocks.width(c), filled = blocks.column_stop(c) - c * COLUMNS;
        const Number *k = at_token<Number>(p.k, p.k_stride, b, kv, c * COLUMNS);
        transpose(turned + (w * keys + c * COLUMNS) * p.D, rows, k, p.k_stride[2], filled, p.D);
        float *zero = sums + w * keys * wide;
        std::fill(zero + c * COLUMNS * D, zero + (c * COLUMNS + rows) * D, 0.f);
        zero += keys * D;
        std::fill(zero + c * COLUMNS * Dv, zero + (c * COLUMNS + rows) * Dv, 0.f);
        if (c == last && rounded) {
          Number *copy = ends + w * COLUMNS * wide;
          padded_rows(k, p.k_stride[2], filled, rows, p.D, copy);
          padded_rows(at_token<Number>(p.v, p.v_stride, b, kv, tail), p.v_stride[2], filled, rows, p.Dv, copy + COLUMNS * p.D);
        }
      }
    });
    // The last block of queries that sees each block of keys: the first to add to its sums.
    std::vector<Index> latest(n * blocks.columns, 0);
    for (Index w = 0; w < n; w++)
      for (Index x = 0; x < blocks.rows; x++) {
        const Interval seen = blocks.seen((first + w) / p.Hkv, x);
        for (Index c = seen.first; c < seen.stop; c++) latest[w * blocks.columns + c] = x;
      }
    share(blocks.rows * group * n, [&](Shift &shift) {
      Buffer<float> scores(COLUMNS * PITCH), products(COLUMNS * PITCH), d_query(p.D * PITCH), norm(ROWS), delta(ROWS), d_inverse(ROWS);
      Buffer<Number> queries(p.D * PITCH), grads(p.Dv * PITCH), by_row(ROWS * wide);
      Buffer<Number> weights(pairs ? COLUMNS * PITCH : 0), gradient(pairs ? COLUMNS * PITCH : 0), packed(pairs ? COLUMNS * PITCH : 0);
      std::vector<float> line(p.d_line ? p.line_length : p.d_psi ? p.S + 2 * p.pad : 0);
      std::unique_ptr<Piecewise> piecewise(p.psi ? new Piecewise(p) : nullptr);
      std::unique_ptr<Difference> difference(p.f ? new Difference(p) : nullptr);
      std::unique_ptr<Diagonals> diagonals(p.d_line || p.d_psi ? new Diagonals : nullptr);
      for (Index job; (job = shift.next()) >= 0;) {
        const Index w = job % n, g = job / n % group, x = blocks.rows - 1 - job / (n * group);
        const Index b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv, h = kv * group + g;
        const Index t0 = x * ROWS, m = blocks.row_stop(x) - t0, columns = round_up(m, LINE), along = (b * p.H + h) * p.T + t0;
        const Interval seen = blocks.seen(b, x);
        const Number *q = at_token<Number>(p.q, p.q_stride, b, h, t0), *grad = at_token<Number>(p.grad, p.grad_stride, b, h, t0);
        pack_transposed(queries, PITCH, columns, q, p.q_stride[2], m, p.D);
        pack_transposed(grads, PITCH, columns, grad, p.grad_stride[2], m, p.Dv);
        Number *query_rows = by_row, *grad_rows = by_row + ROWS * D;
        pack(query_rows, D, columns, q, p.q_stride[2], m, p.D);
        pack(grad_rows, Dv, columns, grad, p.grad_stride[2], m, p.Dv);
        for (Index t = 0; t < columns; t++) {
          norm[t] = -LOWEST, delta[t] = 0.f, d_inverse[t] = 0.f;
          if (t >= m) continue;
          const Number *out = at_token<Number>(p.out, p.out_stride, b, h, t0 + t), *of = grad + t * p.grad_stride[2];
          float sum = 0.f;
          for (Index d = 0; d < p.Dv; d++) sum += static_cast<float>(out[d]) * static_cast<float>(of[d]);
          delta[t] = sum - (p.grad_lse ? p.grad_lse[along + t] : 0.f);
          if (p.lse[along + t] != HIDDEN) norm[t] = p.lse[along + t] * Format::UNIT;
        }
        if (!line.empty()) std::fill(line.begin(), line.end(), 0.f);
        if (difference) difference->clear();
        if (piecewise) std::fill(piecewise->sums().begin(), piecewise->sums().end(), 0.0);
        for (Index c = seen.first; c < seen.stop; c++) {
          const Tile tile = tile_at(p, blocks, b, h, x, c, piecewise.get(), difference.get());
          Operand<Number> k{at_token<Number>(p.k, p.k_stride, b, kv, c * COLUMNS), p.k_stride[2]};
          Operand<Number> v{at_token<Number>(p.v, p.v_stride, b, kv, c * COLUMNS), p.v_stride[2]};
          if (c == last && rounded) k = {ends + w * COLUMNS * wide, p.D}, v = {ends + w * COLUMNS * wide + COLUMNS * p.D, p.Dv};
          format.multiply(tile.rows, columns, p.D, k.data, k.stride, queries, PITCH, scores, PITCH, false);
          format.multiply(tile.rows, columns, p.Dv, v.data, v.stride, grads, PITCH, products, PITCH, false);
          if (piecewise) piecewise->bend(tile, p.scale, scores);
          if (!blocks.whole(b, x, c)) blocks.hide(scores, b, x, c);
          const bool learns = !line.empty() && tile.line;
          Number *lowered = weights, *d_lowered = gradient;
          const Number *d_packed = packed;
          if constexpr (!pairs) lowered = scores, d_lowered = products, d_packed = products;
          uint32_t *words = reinterpret_cast<uint32_t *>(static_cast<Number *>(packed));
          constexpr decltype(&differentiate<Format, Tile::NONE>) by_bias[] = {
              differentiate<Format, Tile::NONE>, differentiate<Format, Tile::LINE>, differentiate<Format, Tile::GAINED>, differentiate<Format, Tile::SUM>};
          by_bias[tile.bias()](tile, p.scale, scores, products, norm, delta, lowered, d_lowered, words, learns ? diagonals.get() : nullptr,
                               p.d_earlier ? difference.get() : nullptr, p.d_psi != nullptr);
          if (p.d_psi) piecewise->collect(tile, products, *diagonals, d_inverse);
          if (learns) diagonals->take(line.data() + tile.distance + (p.d_line ? -p.line_first : p.pad), tile.rows, columns);
          format.multiply(p.D, columns, tile.rows, turned + (w * keys + c * COLUMNS) * p.D, tile.rows, d_packed, PITCH, d_query, PITCH, c > seen.first);
          float *d_key = sums + w * keys * wide + c * COLUMNS * D, *d_value = sums + w * keys * wide + keys * D + c * COLUMNS * Dv;
          std::atomic<Index> &turn = turns[w * blocks.columns + c];
          shift.await(turn, (latest[w * blocks.columns + c] - x) * group + g);
          format.multiply(tile.rows, Dv, columns, lowered, PITCH, grad_rows, Dv, d_value, Dv, true);
          format.multiply(tile.rows, D, columns, d_lowered, PITCH, query_rows, D, d_key, D, true);
          if (p.d_earlier) {
            float *to = p.d_earlier + (b * p.H + h) * p.S + c * COLUMNS;
            for (Index j = 0; j < blocks.column_stop(c) - c * COLUMNS; j++) to[j] += difference->d_earlier()[j];
          }
          turn.fetch_add(1, std::memory_order_release);
        }
        const bool any = seen.first < seen.stop;
        for (Index t = 0; t < m; t++) {
          Number *dq = at_token<Number>(p.dq, p.dq_stride, b, h, t0 + t);
          for (Index d = 0; d < p.D; d++) dq[d] = static_cast<Number>(any ? d_query[d * PITCH + t] * p.scale : 0.f);
        }
        if (p.d_later) std::copy(difference->d_later(), difference->d_later() + m, p.d_later + along);
        if (p.d_inverse)
          for (Index t = 0; t < m; t++) p.d_inverse[along + t] = d_inverse[t];
        if (!line.empty()) {
          shift.await(lines[w * group + g], blocks.rows - 1 - x);
          float *to = (p.d_line ? p.d_line : p.d_psi) + (b * p.H + h) * Index(line.size());
          for (size_t i = 0; i < line.size(); i++) to[i] += line[i];
          if (p.d_pieces) {
            double *pieces = p.d_pieces + (b * p.H + h) * Index(piecewise->sums().size());
            for (double sum : piecewise->sums()) *pieces++ += sum;
          }
          lines[w * group + g].fetch_add(1, std::memory_order_release);
        }
      }
      format.release();
    });
    share(n * blocks.columns, [&](Shift &shift) {
      for (Index job; (job = shift.next()) >= 0;) {
        const Index w = job / blocks.columns, c = job % blocks.columns, b = (first + w) / p.Hkv, kv = (first + w) % p.Hkv;
        const float *d_key = sums + w * keys * wide, *d_value = d_key + keys * D;
        for (Index j = c * COLUMNS; j < blocks.column_stop(c); j++) {
          Number *dk = at_token<Number>(p.dk, p.dk_stride, b, kv, j), *dv = at_token<Number>(p.dv, p.dv_stride, b, kv, j);
          for (Index d = 0; d < p.D; d++) dk[d] = static_cast<Number>(d_key[j * D + d] * p.scale);
          for (Index d = 0; d < p.Dv; d++) dv[d] = static_cast<Number>(d_value[j * Dv + d]);
        }
      }
    });
  }
}

thread_local std::string problem_text;

template <typename Run>
int guarded(const Run &run) {
  try {
    run();
    return 0;
  } catch (const std::exception &error) {
    problem_text = error.what();
    return 1;
  }
}

} // namespace

extern "C" {

int attention_forward(const Problem *p) {
  return guarded([&] { p->bf16 ? forward(*p, Half{p->dot_products != 0}) : forward(*p, Single{}); });
}

int attention_backward(const Problem *p) {
  return guarded([&] { p->bf16 ? backward(*p, Half{p->dot_products != 0}) : backward(*p, Single{}); });
}

const char *attention_problem() { return problem_text.c_str(); }

int64_t attention_padding() { return ROWS + COLUMNS; }
}
