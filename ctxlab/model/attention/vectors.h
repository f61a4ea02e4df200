// Vectors of numbers, as all compiled files here use them: what is loaded, summed and exponentiated at a time.

#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <tuple>

namespace {

using Index = int64_t;
using BFloat16 = c10::BFloat16;
using Floats = at::vec::Vectorized<float>;
using Words = at::vec::Vectorized<int32_t>;
constexpr Index WIDTH = Floats::size();
constexpr float LOG2_E = 1.44269504088896340736f;

// e^x to a unit in the last place for x <= 88: exactly 0 below -87, where a hidden score is. x = n ln 2 + f, ln 2 in two
// parts, and a polynomial in f, least in the largest relative error on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
  const Floats least(-87.f);
  const Floats above = at::vec::clamp_min(x, least);
  const Floats whole = (above * Floats(LOG2_E)).round();
  const Floats f = at::vec::fmadd(whole, Floats(-1.42860682030941723e-6f), at::vec::fmadd(whole, Floats(-0.693145751953125f), above));
  Floats p(0.001381461275741458f);
  p = at::vec::fmadd(p, f, Floats(0.008368710055947304f));
  p = at::vec::fmadd(p, f, Floats(0.04166838899254799f));
  p = at::vec::fmadd(p, f, Floats(0.1666652113199234f));
  p = at::vec::fmadd(p, f, Floats(0.4999999403953552f));
  p = at::vec::fmadd(p, f, Floats(1.f));
  p = at::vec::fmadd(p, f, Floats(1.f));
  const Words exponent = at::vec::convert_to_int_of_same_size(whole) << Words(23);
  const Floats power = at::vec::cast<float>(at::vec::cast<int32_t>(p) + exponent);
  return Floats::blendv(power, Floats(0.f), x < least);
}

// 2^x to three millionths for x <= 127, for what is then rounded to bf16: exactly 0 from -127 down, where a hidden score is.
// x = n + f: `middle` brings n to the last bits, the polynomial in f is 1 at 0, and n is added to its exponent.
inline Floats power_of_two(Floats x) {
  const Floats middle(12582912.f); // 1.5 * 2^23
  const Floats above = at::vec::clamp_min(x, Floats(-127.f));
  const Floats n = above + middle, f = above - (n - middle);
  Floats p(0.009582852944731712f);
  p = at::vec::fmadd(p, f, Floats(0.055906426161527634f));
  p = at::vec::fmadd(p, f, Floats(0.24024099111557007f));
  p = at::vec::fmadd(p, f, Floats(0.6931241750717163f));
  p = at::vec::fmadd(p, f, Floats(1.f));
  return at::vec::cast<float>(at::vec::cast<int32_t>(p) + (at::vec::cast<int32_t>(n) << Words(23)));
}

inline float total(Floats x) {
  return at::vec::vec_reduce_all<float>([](const Floats &a, const Floats &b) { return a + b; }, x);
}

// Two vectors, from fp32 or from bf16.
inline void load(const float *from, Floats &a, Floats &b) {
  a = Floats::loadu(from);
  b = Floats::loadu(from + WIDTH);
}

inline void load(const BFloat16 *from, Floats &a, Floats &b) {
  std::tie(a, b) = at::vec::convert_to_float<BFloat16>(at::vec::Vectorized<BFloat16>::loadu(from));
}

// sums[m][r] = row m . x[r] for M rows, `pitch` apart, and R of x (R, n) fp32.
template <Index M, Index R, typename T>
inline void dot(const T *rows, Index pitch, const float *x, Index n, float (&sums)[M][R]) {
  Floats low[M][R], high[M][R];
  for (Index m = 0; m < M; ++m)
    for (Index r = 0; r < R; ++r) low[m][r] = high[m][r] = Floats(0.f);
  Index i = 0;
  for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
    Floats a[R], b[R];
    for (Index r = 0; r < R; ++r) load(x + r * n + i, a[r], b[r]);
    for (Index m = 0; m < M; ++m) {
      Floats c, d;
      load(rows + m * pitch + i, c, d);
      for (Index r = 0; r < R; ++r) {
        low[m][r] = at::vec::fmadd(c, a[r], low[m][r]);
        high[m][r] = at::vec::fmadd(d, b[r], high[m][r]);
      }
    }
  }
  for (Index m = 0; m < M; ++m)
    for (Index r = 0; r < R; ++r) {
      float sum = total(low[m][r] + high[m][r]);
      for (Index j = i; j < n; ++j) sum += static_cast<float>(rows[m * pitch + j]) * x[r * n + j];
      sums[m][r] = sum;
    }
}

} // namespace
