// Dropout between layers. Whether an element is dropped is a hash of its position, so that it depends neither on
// threads nor on their order, and backward draws the same mask again instead of storing it. The specification, with the
// constants of splitmix64 and lowbias32, is dropout_mask in python/gatewise/reference.py.
#pragma once

#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

GATEWISE_INLINE std::uint64_t mix64(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
GATEWISE_INLINE std::uint32_t mix32(std::uint32_t z) {
  z = (z ^ (z >> 16)) * 0x7FEB352Du;
  z = (z ^ (z >> 15)) * 0x846CA68Bu;
  return z ^ (z >> 16);
}

// to[unit] = from[unit] / (1 - p), or 0 where dropped; to may be from.
inline void drop_row(const Dropout& dropout, Size layer, Size row, Size step, Size units, const Real* from, Real* to) {
  constexpr std::uint64_t golden = 0x9E3779B97F4A7C15u;
  std::uint64_t key = mix64(dropout.seed + golden);
  key = mix64((key ^ dropout.call) + golden);
  key = mix64((key ^ std::uint64_t(layer)) + golden);
  key = mix64((key ^ std::uint64_t(row)) + golden);
  key = mix64((key ^ std::uint64_t(step)) + golden);
  const auto low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
  if (dropout.probability >= 1) {
    for (Size unit = 0; unit < units; ++unit) to[unit] = 0;
    return;
  }
  const auto threshold = static_cast<std::uint32_t>(dropout.probability * 4294967296.0);
  const Real scale = static_cast<Real>(1 / (1 - dropout.probability));
  for (Size unit = 0; unit < units; ++unit) {
    const std::uint32_t draw = mix32(mix32(static_cast<std::uint32_t>(unit) ^ low) ^ high);
    to[unit] = draw < threshold ? Real(0) : from[unit] * scale;
  }
}

}  // namespace gatewise::GATEWISE_KERNEL
