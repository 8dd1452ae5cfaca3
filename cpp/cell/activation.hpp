// exp, sigmoid and tanh for a value type V: a register on a CPU, a scalar in a CUDA thread.
// At most 2.5 ULP over all inputs, float and double; infinities and NaN as in the C library; results below the
// smallest normal number become zero. V brings V::Scalar, V::broadcast, + - * /, fused, minimum, maximum,
// absolute, copy_sign, where_less and exponent_from_low_bits.
#pragma once

namespace gatewise::GATEWISE_KERNEL {

// exp(x) = 2^n (1 + p), n = round(x / ln 2), p = exp(r) - 1, r = x - n ln 2 in [-ln 2 / 2, ln 2 / 2].
// ln 2 is split so that n * ln2_high is exact. p = r + r^2 q(r), q fitted to (expm1(r) - r) / r^2 for the least
// relative error of p: 1.3e-8 for float, 1.8e-17 for double.
template <class Scalar>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr int terms = 5;
  static constexpr float q[terms] = {0x1.000000p-1f, 0x1.5554b0p-3f, 0x1.555486p-5f, 0x1.12283ap-7f, 0x1.6d993cp-10f};
  static constexpr float ln2_high = 0.693359375f, ln2_low = -0x1.bd0106p-13f, log2_e = 0x1.715476p+0f;
  static constexpr float bias = 127, round = 0x1.8p+23f;  // adding `round` leaves the integer in the low bits
  static constexpr float lowest = -104, highest = 89;     // exp is zero below and infinite above
  static constexpr float one_power = 88.3f;               // up to here 2^n is a number, 1 / exp(x) zero from here on
  static constexpr float tanh_is_one = 10;
};

template <>
struct Exponential<double> {
  static constexpr int terms = 10;
  static constexpr double q[terms] = {0x1.0000000000005p-1,  0x1.555555555555cp-3,  0x1.55555555520b2p-5,
                                      0x1.111111110e8efp-7,  0x1.6c16c17f4777bp-10, 0x1.a01a01b5214d3p-13,
                                      0x1.a019a65656064p-16, 0x1.71ddeb9e3d3d3p-19, 0x1.28a2dad111a6ep-22,
                                      0x1.af74256f128d0p-26};
  static constexpr double ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33,
                          log2_e = 0x1.71547652b82fep+0;
  static constexpr double bias = 1023, round = 0x1.8p+52;
  static constexpr double lowest = -746, highest = 710;
  static constexpr double one_power = 709;
  static constexpr double tanh_is_one = 20;
};

// exp(x) in parts: 2^n (1 + p).
template <class V>
struct ExponentialParts {
  V n, p;
};

// x must lie between lowest and highest, or be NaN, which gives NaN.
template <class V>
GATEWISE_INLINE ExponentialParts<V> exponential_parts(V x) {
  using E = Exponential<typename V::Scalar>;
  const auto number = [](typename V::Scalar value) { return V::broadcast(value); };
  const V n = fused(x, number(E::log2_e), number(E::round)) - number(E::round);
  const V r = fused(n, number(-E::ln2_low), fused(n, number(-E::ln2_high), x));
  const V r2 = r * r;
  // Even and odd powers apart: half the latency of Horner's rule.
  constexpr int last_even = (E::terms - 1) / 2 * 2, last_odd = E::terms / 2 * 2 - 1;
  V even = number(E::q[last_even]), odd = number(E::q[last_odd]);
  for (int i = last_even - 2; i >= 0; i -= 2) even = fused(even, r2, number(E::q[i]));
  for (int i = last_odd - 2; i >= 1; i -= 2) odd = fused(odd, r2, number(E::q[i]));
  return {n, fused(fused(odd, r, even), r2, r)};
}

// 2^n for an integer -bias <= n <= bias; 2^-bias is zero.
template <class V>
GATEWISE_INLINE V power_of_two(V n) {
  using E = Exponential<typename V::Scalar>;
  return exponent_from_low_bits(n + V::broadcast(E::round + E::bias));
}

template <class V>
GATEWISE_INLINE V exp(V x) {
  using E = Exponential<typename V::Scalar>;
  const V bounded = minimum(maximum(x, V::broadcast(E::lowest)), V::broadcast(E::highest));
  const auto [n, p] = exponential_parts(bounded);
  // 2^n in two halves: n may lie outside the exponents of a number.
  const V half = fused(n, V::broadcast(0.5), V::broadcast(E::round)) - V::broadcast(E::round);
  const V first = power_of_two(half);
  return fused(first, p, first) * power_of_two(n - half);
}

// 1 / (1 + exp(-x)): right at the lower end too, where it is 1 / exp(-x).
template <class V>
GATEWISE_INLINE V sigmoid(V x) {
  using E = Exponential<typename V::Scalar>;
  const V one = V::broadcast(1), limit = V::broadcast(E::one_power), minus_limit = V::broadcast(-E::one_power);
  const auto [n, p] = exponential_parts(minimum(maximum(V::broadcast(0) - x, minus_limit), limit));
  const V scale = power_of_two(n);
  return one / fused(scale, p, scale + one);
}

// -m / (2 + m) with m = exp(-2|x|) - 1 and the sign of x: nothing cancels at either end. 2 + m is summed from the
// parts, so that m is rounded only once on its way into the quotient.
template <class V>
GATEWISE_INLINE V tanh(V x) {
  using E = Exponential<typename V::Scalar>;
  const V magnitude = minimum(absolute(x), V::broadcast(E::tanh_is_one));
  const auto [n, p] = exponential_parts(magnitude * V::broadcast(-2));
  const V scale = power_of_two(n), one = V::broadcast(1);
  return copy_sign(fused(scale, p, scale - one) / fused(scale, p, scale + one), x);
}

}  // namespace gatewise::GATEWISE_KERNEL
