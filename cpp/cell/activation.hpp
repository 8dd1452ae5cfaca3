// The activations for a value type V, such as a SIMD register. Errors are at most 2.5 ULP over all inputs, float and
// double, of softplus 3 and of gelu 8, even for inputs far below zero. Infinite inputs give the limits, NaN gives NaN;
// results below the smallest normal number become zero. V brings V::Scalar,
// V::broadcast, + - * /, fused, minimum, maximum, absolute, copy_sign, where_less and exponent_from_low_bits.
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
  static constexpr float softsign_is_one = 0x1p+26f;
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
  static constexpr double softsign_is_one = 0x1p+55;
};

// exp(x) in parts: 2^n (1 + p).
template <class V>
struct ExponentialParts {
  V n, p;
};

// c[0] + c[1] x + c[2] x^2 + ..., even and odd powers separately: half the latency of Horner's rule.
template <int terms, class V>
GATEWISE_INLINE V polynomial(const typename V::Scalar (&c)[terms], V x, V x2) {
  constexpr int last_even = (terms - 1) / 2 * 2, last_odd = terms / 2 * 2 - 1;
  V even = V::broadcast(c[last_even]), odd = V::broadcast(c[last_odd]);
  for (int i = last_even - 2; i >= 0; i -= 2) even = fused(even, x2, V::broadcast(c[i]));
  for (int i = last_odd - 2; i >= 1; i -= 2) odd = fused(odd, x2, V::broadcast(c[i]));
  return fused(odd, x, even);
}

template <class V>
GATEWISE_INLINE ExponentialParts<V> exponential_of_remainder(V n, V r) {
  const V r2 = r * r;
  return {n, fused(polynomial(Exponential<typename V::Scalar>::q, r, r2), r2, r)};
}

// x must lie between lowest and highest, or be NaN, which gives NaN.
template <class V>
GATEWISE_INLINE ExponentialParts<V> exponential_parts(V x) {
  using E = Exponential<typename V::Scalar>;
  const auto number = [](typename V::Scalar value) { return V::broadcast(value); };
  const V n = fused(x, number(E::log2_e), number(E::round)) - number(E::round);
  return exponential_of_remainder(n, fused(n, number(-E::ln2_low), fused(n, number(-E::ln2_high), x)));
}

// The same of high + low, a sum that a V cannot hold. `high` must have so few bits that high - n ln2_high is exact.
template <class V>
GATEWISE_INLINE ExponentialParts<V> exponential_parts(V high, V low) {
  using E = Exponential<typename V::Scalar>;
  const auto number = [](typename V::Scalar value) { return V::broadcast(value); };
  const V n = fused(high + low, number(E::log2_e), number(E::round)) - number(E::round);
  return exponential_of_remainder(n, fused(n, number(-E::ln2_high), high) + fused(n, number(-E::ln2_low), low));
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
  // 2^n as a product of two powers, since n may lie outside the exponent range of the type.
  const V half = fused(n, V::broadcast(0.5), V::broadcast(E::round)) - V::broadcast(E::round);
  const V first = power_of_two(half);
  return fused(first, p, first) * power_of_two(n - half);
}

// 1 / (1 + exp(-x)): accurate also far below zero, where it is 1 / exp(-x).
template <class V>
GATEWISE_INLINE V sigmoid(V x) {
  using E = Exponential<typename V::Scalar>;
  const V one = V::broadcast(1), limit = V::broadcast(E::one_power), minus_limit = V::broadcast(-E::one_power);
  const auto [n, p] = exponential_parts(minimum(maximum(V::broadcast(0) - x, minus_limit), limit));
  const V scale = power_of_two(n);
  return one / fused(scale, p, scale + one);
}

// -m / (2 + m) with m = exp(-2|x|) - 1 and the sign of x: nothing cancels at either end. 2 + m is summed from the parts
// of exp, so that m is not rounded before it.
template <class V>
GATEWISE_INLINE V tanh(V x) {
  using E = Exponential<typename V::Scalar>;
  const V magnitude = minimum(absolute(x), V::broadcast(E::tanh_is_one));
  const auto [n, p] = exponential_parts(magnitude * V::broadcast(-2));
  const V scale = power_of_two(n), one = V::broadcast(1);
  return copy_sign(fused(scale, p, scale - one) / fused(scale, p, scale + one), x);
}

template <class V>
GATEWISE_INLINE V relu(V x) {
  return maximum(x, V::broadcast(0));
}

template <class V>
GATEWISE_INLINE V leaky_relu(V x, V slope) {
  return where_less(V::broadcast(0), x, x, x * slope);
}

template <class V>
GATEWISE_INLINE V thresholded_relu(V x, V threshold) {
  const V zero = V::broadcast(0);
  return where_less(threshold, x, x, minimum(maximum(x, zero), zero));  // zero that keeps NaN
}

// (x + 3) / 6, bounded to [0, 1].
template <class V>
GATEWISE_INLINE V hard_sigmoid(V x) {
  const V six = V::broadcast(6);
  return minimum(maximum(x + V::broadcast(3), V::broadcast(0)), six) / six;
}

// alpha x + beta, bounded to [0, 1].
template <class V>
GATEWISE_INLINE V hard_sigmoid(V x, V alpha, V beta) {
  return minimum(maximum(fused(alpha, x, beta), V::broadcast(0)), V::broadcast(1));
}

// x / (1 + |x|), and its limits at infinities, for which the quotient is not a number.
template <class V>
GATEWISE_INLINE V softsign(V x) {
  const V magnitude = absolute(x), one = V::broadcast(1);
  const V large = V::broadcast(Exponential<typename V::Scalar>::softsign_is_one);
  return where_less(magnitude, large, x / (one + magnitude), copy_sign(minimum(magnitude, one), x));
}

// x sigmoid(x) = x e / (1 + e) below zero, x / (1 + e) above, e = exp(-|x|) = 2^n (1 + p). Below zero, 2^n is
// multiplied last and in two halves, since x e can be a normal number where e is too small to be one.
template <class V>
GATEWISE_INLINE V silu(V x) {
  using E = Exponential<typename V::Scalar>;
  const V zero = V::broadcast(0), one = V::broadcast(1), lowest = V::broadcast(E::lowest);
  const auto [n, p] = exponential_parts(maximum(zero - absolute(x), lowest));
  const V half = fused(n, V::broadcast(0.5), V::broadcast(E::round)) - V::broadcast(E::round);
  const V first = power_of_two(half), second = power_of_two(n - half), left = maximum(x, lowest);
  const V below = one + fused(first, p, first) * second;
  return where_less(x, zero, fused(left, p, left) / below * first * second, x / below);
}

// exp(x) - 1 below zero is 2^n - 1 + 2^n p, which is p if n = 0, so that small x lose no digits. In lanes above zero
// the result is meaningless, but not selected.
template <class V>
GATEWISE_INLINE V elu(V x, V alpha) {
  const V bounded = maximum(x, V::broadcast(-Exponential<typename V::Scalar>::one_power));
  const auto [n, p] = exponential_parts(bounded);
  const V scale = power_of_two(n);
  return where_less(x, V::broadcast(0), alpha * fused(scale, p, scale - V::broadcast(1)), x);
}

// scale x above zero, scale alpha (exp(x) - 1) below, with the numbers of Klambauer et al. 2017.
template <class V>
GATEWISE_INLINE V selu(V x) {
  const V scale = V::broadcast(typename V::Scalar(1.0507009873554805)),
          left = V::broadcast(typename V::Scalar(1.7580993408473768));
  return where_less(x, V::broadcast(0), elu(x, left), x * scale);
}

// log(1 + e) = t + t^3 q(t^2) with t = 2 e / (2 + e), as log(1 + e) = 2 artanh(t / 2); q fitted for 0 <= e <= 1 and the
// least relative error of the sum: 4.5e-9 for float, 1.3e-18 for double.
template <class Scalar>
struct Logarithm;

template <>
struct Logarithm<float> {
  static constexpr float q[4] = {0x1.555502p-4f, 0x1.99d1ccp-7f, 0x1.1ec03ep-9f, 0x1.1eca32p-11f};
};

template <>
struct Logarithm<double> {
  static constexpr double q[10] = {0x1.5555555555535p-4,  0x1.99999999a074ep-7,  0x1.249249208c74bp-9,
                                   0x1.c71c741c62eebp-12, 0x1.745cb402a81bbp-14, 0x1.3b1ddb36b2dc0p-16,
                                   0x1.1067c8423ca0ap-18, 0x1.efd819cd041acp-21, 0x1.55b1ddef98aedp-23,
                                   0x1.5c78374b548b2p-24};
};

// max(x, 0) + log(1 + e), e = exp(-|x|): nearly e far below zero, x far above.
template <class V>
GATEWISE_INLINE V softplus(V x) {
  using Scalar = typename V::Scalar;
  const V zero = V::broadcast(0), one = V::broadcast(1), limit = V::broadcast(Exponential<Scalar>::one_power);
  const auto [n, p] = exponential_parts(zero - minimum(absolute(x), limit));
  const V e = (one + p) * power_of_two(n);  // not 2^n + 2^n p: without fused hardware 2^n p may be flushed
  const V t = e / fused(e, V::broadcast(0.5), one), t2 = t * t;
  return maximum(x, zero) + fused(polynomial(Logarithm<Scalar>::q, t2, t2 * t2), t * t2, t);
}

// The normal distribution function at -t is exp(-t^2 / 2) r(t), r = above / below: polynomials in t with positive terms
// only, so that nothing cancels; r(0) = 1/2 exactly. Fitted for 0 <= t <= gelu_is_zero and the least relative error of
// r: 5.8e-9 for float, 7.5e-17 for double.
template <class Scalar>
struct NormalTail;

template <>
struct NormalTail<float> {
  static constexpr float above[5] = {0x1p-1f, 0x1.bdb3e8p-2f, 0x1.72a220p-3f, 0x1.4697dap-5f, 0x1.063df0p-8f};
  static constexpr float below[6] = {0x1p+0f,        0x1.ab1c22p+0f, 0x1.31711ap+0f,
                                     0x1.da9eacp-2f, 0x1.995abcp-4f, 0x1.48aab2p-7f};
  static constexpr float gelu_is_zero = 13.28125f;  // where power_of_two is zero, too
  static constexpr float split = 0x1.8p+15f;        // added and subtracted, it leaves 12 bits of t
};

template <>
struct NormalTail<double> {
  static constexpr double above[10] = {0x1p-1,
                                       0x1.8c4ef5c428560p-1,
                                       0x1.2f88a8972b969p-1,
                                       0x1.2765207943471p-2,
                                       0x1.8e98813636de8p-4,
                                       0x1.8119ba5d7febcp-6,
                                       0x1.0a5c49bb37289p-8,
                                       0x1.fe75813503d26p-12,
                                       0x1.35c4d00b2bc5bp-15,
                                       0x1.7013047555b7bp-20};
  static constexpr double below[11] = {0x1p+0,
                                       0x1.2c488fb165031p+1,
                                       0x1.475bc253afa6ap+1,
                                       0x1.b5e381e16ddb2p+0,
                                       0x1.8f281d0ba9b79p-1,
                                       0x1.040689a594f03p-2,
                                       0x1.ec978893129b5p-5,
                                       0x1.50ddd20c07be7p-7,
                                       0x1.40c8a36f01b69p-10,
                                       0x1.843cd461d75dap-14,
                                       0x1.cd500d944dac4p-19};
  static constexpr double gelu_is_zero = 37.65625;
  static constexpr double split = 0x1.8p+32;  // leaves 26 bits
};

// x times the normal distribution function: x exp(-t^2 / 2) r(t) below zero, x (1 - exp(-t^2 / 2) r(t)) above, t = |x|.
// The rounding error of t^2 would become one of exp, so t^2 has two parts, high^2 + (t - high) (t + high), where `high`
// has so few bits that its square is exact.
template <class V>
GATEWISE_INLINE V gelu(V x) {
  using Scalar = typename V::Scalar;
  using N = NormalTail<Scalar>;
  const V half = V::broadcast(0.5), limit = V::broadcast(N::gelu_is_zero), split = V::broadcast(N::split);
  const V zero = V::broadcast(0), t = minimum(absolute(x), limit), t2 = t * t;
  const V high = (t + split) - split;
  const auto [n, p] = exponential_parts(high * high * (zero - half), (high - t) * ((t + high) * half));
  const V scale = power_of_two(n), above = polynomial(N::above, t, t2);
  const V tail = fused(above, p, above) / polynomial(N::below, t, t2);  // without 2^n, which may be tiny
  const V left = maximum(x, zero - limit) * tail * scale, right = x * fused(zero - tail, scale, V::broadcast(1));
  return where_less(x, zero, left, right);
}

// The functions of cells without a formula.
struct StandardFunctions {
  template <class V>
  GATEWISE_INLINE static V gate(V sum) {
    return sigmoid(sum);
  }
  template <class V>
  GATEWISE_INLINE static V candidate(V sum) {
    return tanh(sum);
  }
  template <class V>
  GATEWISE_INLINE static V output(V state) {
    return tanh(state);
  }
};

}  // namespace gatewise::GATEWISE_KERNEL
