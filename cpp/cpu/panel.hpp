// The one product of this library, and the panels that it reads.
//
//   sums(p, m, g) = start(p, m, g) + scalars(m, 0) vectors(p, 0, g) + scalars(m, 1) vectors(p, 1, g) + ...
//
// where sums, start and vectors are registers, and a panel p holds the weights of `lanes` units: for each k in
// ascending order the G gates' registers in a row.
//
// The additions have one fixed order: chains of about `chain_length` k's, each summed from zero in the order of k, are
// added to start one after the other. It depends only on the number of k's, so that the bits of a sum depend on nothing
// but its own row, whichever tile, block or thread computes it. (One chain over all k would have a fixed order, too,
// but its rounding errors grow with its length: with chains float32 is as accurate as PyTorch's.)
//
// What the letters mean to each caller (sequence.hpp):
//                           m                 k                      p, g
//   input, hidden product   row of the batch  input, hidden unit     hidden units, gates
//   gradient of x and h     row of the batch  gates of all panels    inputs or hidden units, 1
//   gradient of weights     input unit        time and batch         hidden units, gates
#pragma once

#include "register.hpp"

namespace gatewise::GATEWISE_KERNEL {

constexpr Size panels_of(Size units) { return (units + lanes - 1) / lanes; }
constexpr Size units_in(Size panel, Size units) {
  return units - panel * lanes < lanes ? units - panel * lanes : lanes;
}

constexpr Size smaller(Size a, Size b) { return a < b ? a : b; }
constexpr Size larger(Size a, Size b) { return a > b ? a : b; }

// The average length of a chain. Short enough for the accuracy of float32 (above), and for the chain's part of a panel,
// 16 KB with 4 gates and AVX2, to stay in L1 while all tiles pass over it; long enough that its end costs
// only 3 to 5 % (256: half of that, but errors larger than PyTorch's).
constexpr Size chain_length = 128;

// Where a product reads and writes. All strides count elements.
struct Scalars {
  const Real* data = nullptr;
  Size row = 0, step = 1, segment = 0;
};
struct Vectors {
  const Real* data = nullptr;  // [panel][segment][step][gate][lane]
  Size panel = 0, step = 0, segment = 0;
};
struct Start {
  const Real* data = nullptr;  // [panel][row][gate][lane]; null: zero
  Size panel = 0, row = 0;     // row 0: every row has the same start
};
struct Sums {
  Real* data = nullptr;  // [panel][row][gate][lane]; may be the start itself
  Size panel = 0, row = 0;

  Start as_start() const { return {data, panel, row}; }
};

// k runs over `segments` times `run` steps.
struct Product {
  Size rows = 0, panels = 0, segments = 1, run = 0;
  Scalars scalars{};
  Vectors vectors{};
  Start start{};
  Sums sums{};
  bool descending = false;  // from the last panel to the first
};

// How the sums of a product are made: in chains over several segments, or over a part of a long one; in tiles of
// `tile_rows` rows, the first `taller_tiles` of one row more.
struct Order {
  Size chain_segments, chain_run, tiles, tile_rows, taller_tiles;
};

// One chain of some panels: where it is, and what to prefetch meanwhile.
struct Chain {
  Size segments, run;
  const Real *scalars, *vectors;
  const Real* start;
  Size start_panel, start_row;
  Real* sums;
  const char* next;
  Size next_step;  // bytes from one prefetch to the one after
};

// Calls body(0) ... body(N - 1), unrolled before the compiler looks at arrays, so that an array of registers that the
// body indexes stays in registers (with a loop GCC 12 puts it on the stack).
template <class Body, int... index>
GATEWISE_INLINE void repeat(std::integer_sequence<int, index...>, const Body& body) {
  (body(index), ...);
}
template <int N, class Body>
GATEWISE_INLINE void repeat(const Body& body) {
  repeat(std::make_integer_sequence<int, N>(), body);
}

// One k of a tile: M scalars times P * G vectors. Whichever are fewer stay in registers, the others pass through one.
template <int G, int M, int P>
GATEWISE_INLINE void multiply_step(const Real* scalar, Size row, const Real* vector, Size panel,
                                   Register (&sums)[P][M][G]) {
  const auto scalar_of = [&](int m) GATEWISE_LAMBDA { return Register::broadcast(scalar[m * row]); };
  const auto vector_of = [&](int p, int g) GATEWISE_LAMBDA { return Register::load(vector + p * panel + g * lanes); };
  if constexpr (M <= P * G) {
    Register scalars[M];
    repeat<M>([&](int m) GATEWISE_LAMBDA { scalars[m] = scalar_of(m); });
    repeat<P>([&](int p) GATEWISE_LAMBDA {
      repeat<G>([&](int g) GATEWISE_LAMBDA {
        const Register vector_value = M > 1 ? in_register(vector_of(p, g)) : vector_of(p, g);
        repeat<M>([&](int m) GATEWISE_LAMBDA { sums[p][m][g] = fused(scalars[m], vector_value, sums[p][m][g]); });
      });
    });
  } else {
    Register vectors[P][G];
    repeat<P>([&](int p) GATEWISE_LAMBDA {
      repeat<G>([&](int g) GATEWISE_LAMBDA { vectors[p][g] = in_register(vector_of(p, g)); });
    });
    repeat<M>([&](int m) GATEWISE_LAMBDA {
      const Register scalar_value = scalar_of(m);
      repeat<P>([&](int p) GATEWISE_LAMBDA {
        repeat<G>([&](int g) GATEWISE_LAMBDA { sums[p][m][g] = fused(scalar_value, vectors[p][g], sums[p][m][g]); });
      });
    });
  }
}

// How many prefetches each k makes, so that two tiles fetch as many cache lines as they read. They go into the first
// cache, even if a chain's weights fill it (AVX-512: 32 KB): from the second they would come too late (8 % of the
// time).
template <int G>
constexpr int prefetches = (G * lanes * Size(sizeof(Real)) + 127) / 128;

// The micro-kernel: `tiles` times M rows of P panels, the M * P * G sums of a tile in registers from the first k of a
// chain to its last.
template <int G, int M, int P>
void multiply_tiles(const Product& product, const Chain& chain, Size tiles) {
  const auto each_sum = [](const auto& body) GATEWISE_LAMBDA {
    repeat<P>([&](int p) GATEWISE_LAMBDA {
      repeat<M>([&](int m) GATEWISE_LAMBDA { repeat<G>([&](int g) GATEWISE_LAMBDA { body(p, m, g); }); });
    });
  };
  const auto scalars = product.scalars;
  const auto vectors = product.vectors;
  const Size segments = chain.segments, run = chain.run, next_step = chain.next_step;
  const Size start_panel = chain.start_panel, start_row = chain.start_row;
  const Size sums_panel = product.sums.panel, sums_row = product.sums.row;
  const Real *first_scalar = chain.scalars, *start = chain.start;
  Real* out = chain.sums;
  const char* next = chain.next;
  for (Size tile = 0; tile < tiles; ++tile) {
    Register sums[P][M][G];
    each_sum([&](int p, int m, int g) GATEWISE_LAMBDA { sums[p][m][g] = Register::broadcast(0); });
    // What the chain is added to may have left the caches, as gradients of weights do (12 % of the time of their
    // product).
    if constexpr (M > 1)
      if (start)
        each_sum([&](int p, int m, int g)
                     GATEWISE_LAMBDA { __builtin_prefetch(start + p * start_panel + m * start_row + g * lanes); });
    for (Size segment = 0; segment < segments; ++segment) {
      const Real* scalar = first_scalar + segment * scalars.segment;
      const Real* vector = chain.vectors + segment * vectors.segment;
#pragma GCC unroll 2  // 2 % faster; 4 or 8: no better
      for (Size k = 0; k < run; ++k, scalar += scalars.step, vector += vectors.step) {
        multiply_step<G, M, P>(scalar, scalars.row, vector, vectors.panel, sums);
        if constexpr (M > 1)  // one row: as fast as the cache anyhow
          repeat<prefetches<G>>([&](int) GATEWISE_LAMBDA {
            repeat<P>([&](int p)
                          GATEWISE_LAMBDA { __builtin_prefetch(next + p * vectors.panel * Size(sizeof(Real))); });
            next += next_step;
          });
      }
    }
    if (start) {
      each_sum([&](int p, int m, int g) GATEWISE_LAMBDA {
        sums[p][m][g] = Register::load(start + p * start_panel + m * start_row + g * lanes) + sums[p][m][g];
      });
      start += M * start_row;
    }
    each_sum([&](int p, int m, int g)
                 GATEWISE_LAMBDA { sums[p][m][g].store(out + p * sums_panel + m * sums_row + g * lanes); });
    first_scalar += M * scalars.row;
    out += M * sums_row;
  }
}

// With G gates a tile has at most this many rows; with fewer rows it takes several panels, a power of two. One or two
// rows are bound by the cache that holds the weights. They take only as many panels as keep enough sums in flight,
// since each panel is one more place to read from, and 16 of them, a power of two apart, displace each other in the
// cache (AVX-512, H 256: a step of an RNN and the gradient of h take half of the time).
template <int G>
constexpr int max_rows = G == 1 ? accumulators / (accumulators > 12 ? 4 : 2) : accumulators / G;
constexpr int max_panels(int gates, int rows) {
  const int most = rows > 2 ? accumulators : smaller(accumulators, 2 * min_sums - 1);
  int panels = 1;
  while (2 * panels * rows * gates <= most) panels *= 2;
  return panels;
}

// Rows M and panels P are known only at run time: these find the instantiation that has them.
template <int G, int M, int P>
void multiply_tiles(const Product& product, const Chain& chain, Size tiles, Size panels) {
  if (panels == P) return multiply_tiles<G, M, P>(product, chain, tiles);
  if constexpr (P > 1) return multiply_tiles<G, M, P / 2>(product, chain, tiles, panels);
  __builtin_trap();  // tiles of one product whose rows allow unequal numbers of panels
}
template <int G, int M = max_rows<G>>
void multiply_tiles(const Product& product, const Chain& chain, Size tiles, Size rows, Size panels) {
  if (rows == M) return multiply_tiles<G, M, max_panels(G, M)>(product, chain, tiles, panels);
  if constexpr (M > 1) multiply_tiles<G, M - 1>(product, chain, tiles, rows, panels);
}

// Parts of a long segment are as equal as possible, since the end of a short chain costs as much as that of a long one.
// So are tiles: 4 rows are 2 + 2, not 3 + 1, since a tile of few rows has too few sums in flight.
template <int G>
Order order_of(const Product& product) {
  Order order;
  const Size run = product.run, parts = larger(1, (run + chain_length / 2) / chain_length);
  order.chain_run = parts == 1 ? run : (run + parts - 1) / parts;
  order.chain_segments = product.segments == 1 || run >= chain_length ? 1 : chain_length / larger(1, run);
  order.tiles = (product.rows + max_rows<G> - 1) / max_rows<G>;
  order.tile_rows = order.tiles == 1 ? product.rows : product.rows / order.tiles;
  order.taller_tiles = product.rows - order.tiles * order.tile_rows;
  return order;
}

// All rows of `width` panels, beginning with `panel`, chain by chain. All tiles pass over the weights of one chain,
// which are in L1, and together prefetch those of the next chain, or after the last one those of the next
// panels: else the first tile would wait for each of them (H 650, B 20: 65 % of the peak instead of 80). The chain is
// filled in place: a copy would be read before its stores have completed (3 % of the time).
template <int G>
void multiply_panels(const Product& product, const Order& order, Size panel, Size width) {
  const Size bytes = product.vectors.step * Size(sizeof(Real));
  const Real* const vectors = product.vectors.data + panel * product.vectors.panel;
  Real* const sums = product.sums.data + panel * product.sums.panel;
  Chain chain;
  chain.start = product.start.data ? product.start.data + panel * product.start.panel : nullptr;
  chain.start_panel = product.start.panel;
  chain.start_row = product.start.row;
  Size segment = 0, step = 0;
  do {
    chain.segments = smaller(order.chain_segments, product.segments - segment);
    chain.run = smaller(order.chain_run, product.run - step);
    chain.scalars = product.scalars.data + segment * product.scalars.segment + step * product.scalars.step;
    chain.vectors = vectors + segment * product.vectors.segment + step * product.vectors.step;
    chain.sums = sums;
    const Size steps = chain.segments * chain.run;
    const bool last = segment + chain.segments == product.segments && step + chain.run == product.run;
    const Real* const next = last ? vectors + (product.descending ? -width : width) * product.vectors.panel
                                  : chain.vectors + steps * product.vectors.step;
    // With one tile each weight is used once: nothing to keep in L1.
    chain.next = reinterpret_cast<const char*>(order.tiles == 1 ? chain.vectors : next);
    chain.next_step = order.tiles == 1 ? 0 : bytes / prefetches<G> / order.tiles;
    if (order.taller_tiles > 0) {
      multiply_tiles<G>(product, chain, order.taller_tiles, order.tile_rows + 1, width);
      const Size rows = order.taller_tiles * (order.tile_rows + 1);
      chain.scalars += rows * product.scalars.row;
      chain.sums += rows * product.sums.row;
      if (chain.start) chain.start += rows * chain.start_row;
      chain.next += order.taller_tiles * steps * prefetches<G> * chain.next_step;
    }
    multiply_tiles<G>(product, chain, order.tiles - order.taller_tiles, order.tile_rows, width);
    chain.start = sums;
    chain.start_panel = product.sums.panel;
    chain.start_row = product.sums.row;
    step += order.chain_run;
    if (step >= product.run) {
      step = 0;
      segment += order.chain_segments;
    }
  } while (segment < product.segments);
}

// The whole product.
template <int G>
void multiply(const Product& product) {
  if (product.rows == 0) return;
  const Order order = order_of<G>(product);
  Size width = max_panels(G, static_cast<int>(order.tile_rows + (order.taller_tiles > 0)));
  for (Size done = 0; done < product.panels; done += width) {
    while (width > product.panels - done) width /= 2;
    multiply_panels<G>(product, order, product.descending ? product.panels - done - width : done, width);
  }
}

}  // namespace gatewise::GATEWISE_KERNEL
