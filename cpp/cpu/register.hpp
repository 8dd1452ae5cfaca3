// V on a CPU: one SIMD register of Real, as wide as this object's compiler flags allow, wrapping Eigen's packet. These
// are all the operations of a machine that the cells (cell/) and the micro-kernel (panel.hpp) need.
#pragma once

#include <Eigen/Core>

#include "../core/contract.hpp"

namespace gatewise::GATEWISE_KERNEL {

using Real = GATEWISE_REAL;

struct Register {
  using Scalar = Real;
  using Packet = Eigen::internal::packet_traits<Real>::type;

  Packet packet;

  Register() = default;
  Register(Packet value) : packet(value) {}
  static Register broadcast(Real value) { return Eigen::internal::pset1<Packet>(value); }
  static Register load(const Real* address) { return Eigen::internal::ploadu<Packet>(address); }
  void store(Real* address) const { Eigen::internal::pstoreu(address, packet); }
};

// The width of a panel in hidden units.
constexpr Size lanes = Eigen::internal::packet_traits<Real>::size;

// How many sums the micro-kernel keeps in registers: what is left of 32 (AVX-512, AArch64) or 16 (others) after a
// panel's weights and one input. And how many hide the latency of products at least: 4 cycles x 2 products a cycle, on
// AArch64 x 4.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int accumulators = 24;
#else
constexpr int accumulators = 12;
#endif
#if defined(__aarch64__)
constexpr int min_sums = 16;
#else
constexpr int min_sums = 8;
#endif

GATEWISE_INLINE Register operator+(Register a, Register b) { return Eigen::internal::padd(a.packet, b.packet); }
GATEWISE_INLINE Register operator-(Register a, Register b) { return Eigen::internal::psub(a.packet, b.packet); }
GATEWISE_INLINE Register operator*(Register a, Register b) { return Eigen::internal::pmul(a.packet, b.packet); }
GATEWISE_INLINE Register operator/(Register a, Register b) { return Eigen::internal::pdiv(a.packet, b.packet); }

// a * b + c, rounded once if the hardware can. Products and sums are rounded together only here: kernels are compiled
// with -ffp-contract=off, so that no compiler decides it.
GATEWISE_INLINE Register fused(Register a, Register b, Register c) {
  return Eigen::internal::pmadd(a.packet, b.packet, c.packet);
}

// The value itself. Keeps GCC from reading it from memory again at each use, which would make loads the bottleneck.
GATEWISE_INLINE Register in_register(Register value) {
#if defined(__x86_64__)
  asm("" : "+x"(value.packet));
#elif defined(__aarch64__)
  asm("" : "+w"(value.packet));
#endif
  return value;
}

// If `value` is NaN these give NaN: Eigen keeps the first argument if the two do not compare.
GATEWISE_INLINE Register minimum(Register value, Register limit) {
  return Eigen::internal::pmin(value.packet, limit.packet);
}
GATEWISE_INLINE Register maximum(Register value, Register limit) {
  return Eigen::internal::pmax(value.packet, limit.packet);
}

GATEWISE_INLINE Register absolute(Register a) { return Eigen::internal::pabs(a.packet); }

// |magnitude| with the sign of `sign`.
GATEWISE_INLINE Register copy_sign(Register magnitude, Register sign) {
  using namespace Eigen::internal;
  const auto mask = pset1<Register::Packet>(Real(-0.0));
  return por(pandnot(magnitude.packet, mask), pand(sign.packet, mask));
}

// a < b ? yes : no, lane by lane; `no` where either is NaN.
GATEWISE_INLINE Register where_less(Register a, Register b, Register yes, Register no) {
  using namespace Eigen::internal;
  return pselect(pcmp_lt(a.packet, b.packet), yes.packet, no.packet);
}

// The low bits of `value` shifted into the exponent: 2^n for value = 1.5 * 2^mantissa + bias + n.
GATEWISE_INLINE Register exponent_from_low_bits(Register value) {
  using Integer = std::conditional_t<sizeof(Real) == 4, std::int32_t, std::int64_t>;
  typedef Integer Integers __attribute__((vector_size(sizeof(Register::Packet))));
  Integers bits;
  __builtin_memcpy(&bits, &value.packet, sizeof bits);
  bits <<= sizeof(Real) == 4 ? 23 : 52;
  Register power;
  __builtin_memcpy(&power.packet, &bits, sizeof bits);
  return power;
}

// The last panel of a row has `count` units: only they are read and written; the other lanes are zero.
GATEWISE_INLINE Register load_first(const Real* address, Size count) {
  if (count == lanes) return Register::load(address);
  Real padded[lanes] = {};
  for (Size lane = 0; lane < count; ++lane) padded[lane] = address[lane];
  return Register::load(padded);
}
GATEWISE_INLINE void store_first(Register value, Real* address, Size count) {
  if (count == lanes) return value.store(address);
  Real padded[lanes];
  value.store(padded);
  for (Size lane = 0; lane < count; ++lane) address[lane] = padded[lane];
}
GATEWISE_INLINE Register only_first(Register value, Size count) {
  if (count == lanes) return value;
  Real padded[lanes];
  value.store(padded);
  return load_first(padded, count);
}

}  // namespace gatewise::GATEWISE_KERNEL
