// A number made of all bits of some memory, to find out whether weights that somebody else may write to have changed.
//
// Each 64-bit lane of some registers holds a remainder, like a CRC: the words that it has read, taken as a polynomial
// over GF(2), modulo a primitive polynomial of degree 64. A word is added without carry, after a step of Marsaglia's
// xorshift (7, 9), whose period is 2^64 - 1. If one word of a lane changes, or two are exchanged, or the signs of some
// words at equal distances, the remainder always changes; after any other change it stays the same in one case of 2^64.
// At the end the remainders of all lanes are multiplied into one number.
//
// Microseconds for weights of 128 KB, 512 KB and 8 MB, if as much other memory is read between two calls, as by a step
// with packed weights (Xeon of 2023 with an L2 of 2 MB):
//   this, AVX-512                    1.6     7   370
//   this, AVX2                       2.7    11   380
//   this, SSE2                       5      20   480
//   memcmp against a copy            2.6    14   610   which needs twice the room in the caches
//   a fingerprint by multiplication  15     45   850   which only AVX-512 can do in registers
#pragma once

#include "panel.hpp"

namespace gatewise::GATEWISE_KERNEL {

class Fingerprint {
 public:
  GATEWISE_INLINE void add(const Memory& memory) {
    const char* data = static_cast<const char*>(memory.data);
    Size left = memory.bytes;
    for (; left >= block; left -= block, data += block) add_block(data);
    if (left == 0) return;
    char padded[block] = {};
    for (Size i = 0; i < left; ++i) padded[i] = data[i];
    add_block(padded);
  }

  std::uint64_t value() const {
    std::uint64_t all = 0;
    for (const Words& words : sums_)
      for (Size lane = 0; lane < width / 8; ++lane) {
        all = (all ^ words[lane]) * 0x9E3779B97F4A7C15u;  // odd, so that no bit of a lane is lost
        all ^= all >> 32;
      }
    return all;
  }

 private:
  static constexpr Size width = larger(16, sizeof(Register::Packet));
  static constexpr int chains = width == 64 ? 4 : 8;  // enough to hide the latency of a step, five instructions
  static constexpr Size block = chains * width;
  typedef std::uint64_t Words __attribute__((vector_size(width)));

  GATEWISE_INLINE void add_block(const char* data) {
    repeat<chains>([&](int i) GATEWISE_LAMBDA {
      Words next;
      __builtin_memcpy(&next, data + i * width, width);
      sums_[i] ^= sums_[i] << 7;
      sums_[i] ^= sums_[i] >> 9;
      sums_[i] ^= next;
    });
  }

  Words sums_[chains] = {};
};

}  // namespace gatewise::GATEWISE_KERNEL
