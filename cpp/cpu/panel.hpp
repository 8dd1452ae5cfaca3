// The one product of this library, and the panels that it reads.
//
//   sums(p, m, g) = start(p, m, g) + scalars(m, 0) vectors(p, 0, g) + scalars(m, 1) vectors(p, 1, g) + ...
//
// where sums, start and vectors are registers, and a panel p holds the weights of `lanes` units: for each k in
// ascending order the G gates' registers in a row.
//
// The additions have one fixed order: chains of `chain_length` k's or so, each from zero in the order of k, are added
// to start one after the other. It depends on the number of k's alone, so that the bits of a sum depend on nothing but
// its own row, whatever the tile, the block or the thread that computes it. (One chain over all k would do as well, but
// its rounding errors grow with its length: with chains float32 is as near to the truth as PyTorch's.)
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

// The length of a chain, on average. Short enough for float32 (above), and for the part of a panel that belongs to one
// chain, 16 KB with 4 gates and AVX2, to stay in the first cache while all tiles pass over it; long enough that its end
// costs 3 to 5 % (256: half of that, but errors above PyTorch's).
constexpr Size chain_length = 128;

// All strides count elements. k runs over `segments` times `run` steps.
struct Product {
  Size rows, panels, segments, run;

  struct {
    const Real* data;
    Size row, step, segment;
  } scalars;
  struct {
    const Real* data;  // [panel][segment][step][gate][lane]
    Size panel, step, segment;
  } vectors;
  struct {
    const Real* data;  // [panel][row][gate][lane]; null: zero. row 0: the same start for every row
    Size panel, row;
  } start;
  struct {
    Real* data;  // [panel][row][gate][lane]; may be start itself
    Size panel, row;
  } sums;
  // What to bring nearer meanwhile: a prefetch at each step, `step` bytes on from the one before.
  struct {
    const char* data;
    Size step;
  } next;
  // A chain goes over some whole segments, or over a part of one that is longer: set by multiply.
  Size chain_segments, chain_run;
  bool descending;  // from the last panel to the first
};

// Calls body(0) ... body(N - 1), unrolled before the compiler looks at arrays, so that an array of registers indexed
// in it lives in registers (GCC 12 puts it on the stack if a loop does it).
template <class Body, int... index>
GATEWISE_INLINE void repeat(std::integer_sequence<int, index...>, const Body& body) {
  (body(index), ...);
}
template <int N, class Body>
GATEWISE_INLINE void repeat(const Body& body) {
  repeat(std::make_integer_sequence<int, N>(), body);
}

// One k of a tile: M scalars times P * G vectors. The fewer of the two are held in registers, the others pass through
// one.
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
        const Register one = M > 1 ? in_register(vector_of(p, g)) : vector_of(p, g);
        repeat<M>([&](int m) GATEWISE_LAMBDA { sums[p][m][g] = fused(scalars[m], one, sums[p][m][g]); });
      });
    });
  } else {
    Register vectors[P][G];
    repeat<P>([&](int p) GATEWISE_LAMBDA {
      repeat<G>([&](int g) GATEWISE_LAMBDA { vectors[p][g] = in_register(vector_of(p, g)); });
    });
    repeat<M>([&](int m) GATEWISE_LAMBDA {
      const Register one = scalar_of(m);
      repeat<P>([&](int p) GATEWISE_LAMBDA {
        repeat<G>([&](int g) GATEWISE_LAMBDA { sums[p][m][g] = fused(one, vectors[p][g], sums[p][m][g]); });
      });
    });
  }
}

// How many prefetches a k takes, so that two tiles bring as many cache lines as they read; and into which cache: the
// first, where a chain's weights and the next one's fit into it together (AVX2: 16 KB of 32), else the second.
template <int G>
constexpr Size step_bytes = G * lanes * Size(sizeof(Real));
template <int G>
constexpr int prefetches = (step_bytes<G> + 127) / 128;
template <int G>
constexpr int locality = chain_length * step_bytes<G> <= 16 * 1024 ? 3 : 2;

// The micro-kernel: `tiles` times M rows of P panels, the M * P * G sums of a tile in registers from the first k of a
// chain to its last.
template <int G, int M, int P>
void multiply_tiles(const Product& product, Size tiles) {
  const auto each_sum = [](const auto& body) GATEWISE_LAMBDA {
    repeat<P>([&](int p) GATEWISE_LAMBDA {
      repeat<M>([&](int m) GATEWISE_LAMBDA { repeat<G>([&](int g) GATEWISE_LAMBDA { body(p, m, g); }); });
    });
  };
  const auto scalars = product.scalars;
  const auto vectors = product.vectors;
  const auto out = product.sums;
  const Size chain_run = product.chain_run, chain_segments = product.chain_segments;
  auto next = product.next;
  for (Size tile = 0; tile < tiles; ++tile) {
    const Real* const first_scalar = scalars.data + tile * M * scalars.row;
    Real* const sum = out.data + tile * M * out.row;
    auto start = product.start;
    if (start.data) start.data += tile * M * start.row;
    Size first_segment = 0, first_step = 0;
    do {
      const Size end_segment = smaller(product.segments, first_segment + chain_segments);
      const Size run = smaller(product.run - first_step, chain_run);
      Register sums[P][M][G];
      each_sum([&](int p, int m, int g) GATEWISE_LAMBDA { sums[p][m][g] = Register::broadcast(0); });
      for (Size segment = first_segment; segment < end_segment; ++segment) {
        const Real* scalar = first_scalar + segment * scalars.segment + first_step * scalars.step;
        const Real* vector = vectors.data + segment * vectors.segment + first_step * vectors.step;
#pragma GCC unroll 2  // 2 % faster; 4 or 8: no better
        for (Size k = 0; k < run; ++k, scalar += scalars.step, vector += vectors.step) {
          multiply_step<G, M, P>(scalar, scalars.row, vector, vectors.panel, sums);
          if constexpr (M > 1)  // one row: as fast as the cache anyhow
            repeat<prefetches<G>>([&](int) GATEWISE_LAMBDA {
              repeat<P>([&](int p) GATEWISE_LAMBDA {
                __builtin_prefetch(next.data + p * vectors.panel * Size(sizeof(Real)), 0, locality<G>);
              });
              next.data += next.step;
            });
        }
      }
      if (start.data)
        each_sum([&](int p, int m, int g) GATEWISE_LAMBDA {
          sums[p][m][g] = Register::load(start.data + p * start.panel + m * start.row + g * lanes) + sums[p][m][g];
        });
      each_sum([&](int p, int m, int g)
                   GATEWISE_LAMBDA { sums[p][m][g].store(sum + p * out.panel + m * out.row + g * lanes); });
      start = {sum, out.panel, out.row};
      first_step += chain_run;
      if (first_step >= product.run) first_step = 0, first_segment = end_segment;
    } while (first_segment < product.segments);
  }
}

// With G gates a tile has at most this many rows; with fewer rows it takes several panels, in powers of two.
template <int G>
constexpr int most_rows = G == 1 ? accumulators / (accumulators > 12 ? 4 : 2) : accumulators / G;
constexpr int most_panels(int gates, int rows) {
  int panels = 1;
  while (2 * panels * rows * gates <= accumulators) panels *= 2;
  return panels;
}

// Rows M and panels P are numbers known only at run time: walk down to the instantiation that has them.
template <int G, int M, int P>
void multiply_tiles(const Product& product, Size tiles, Size panels) {
  if (panels == P) return multiply_tiles<G, M, P>(product, tiles);
  if constexpr (P > 1) multiply_tiles<G, M, P / 2>(product, tiles, panels);
}
template <int G, int M = most_rows<G>>
void multiply_tiles(const Product& product, Size tiles, Size rows, Size panels) {
  if (rows == M) return multiply_tiles<G, M, most_panels(G, M)>(product, tiles, panels);
  if constexpr (M > 1) multiply_tiles<G, M - 1>(product, tiles, rows, panels);
}

// All rows of `width` panels. Tiles are as even as they can be: 4 rows are 2 + 2, not 3 + 1, since a tile of few rows
// has too few sums in flight.
template <int G>
void multiply_rows(Product product, Size tiles, Size width) {
  const Size rows = product.rows / tiles, taller = product.rows % tiles;
  if (taller > 0) {
    multiply_tiles<G>(product, taller, rows + 1, width);
    const Size done = taller * (rows + 1);
    product.next.data += taller * product.segments * product.run * prefetches<G> * product.next.step;
    product.scalars.data += done * product.scalars.row;
    product.sums.data += done * product.sums.row;
    if (product.start.data) product.start.data += done * product.start.row;
  }
  multiply_tiles<G>(product, tiles - taller, rows, width);
}

// Chain by chain over `width` panels: the same bits as tile by tile. All tiles pass over the weights of one chain in
// the first cache, and together bring those of the next one, which follow them in memory: else the first tile would
// wait for each of them (H 650, B 20: 65 % of the peak instead of 80).
template <int G>
void multiply_chains(Product product, Size tiles, Size width) {
  const Size run = product.chain_run, segments = product.chain_segments;
  for (Size segment = 0; segment < product.segments; segment += segments) {
    Size step = 0;
    do {
      Product chain = product;
      chain.segments = smaller(segments, product.segments - segment);
      chain.run = smaller(run, product.run - step);
      chain.scalars.data += segment * product.scalars.segment + step * product.scalars.step;
      chain.vectors.data += segment * product.vectors.segment + step * product.vectors.step;
      if (segment + step > 0) chain.start = {product.sums.data, product.sums.panel, product.sums.row};
      const Size steps = chain.segments * chain.run, bytes = product.vectors.step * Size(sizeof(Real));
      chain.next = {reinterpret_cast<const char*>(chain.vectors.data) + steps * bytes, bytes / prefetches<G> / tiles};
      multiply_rows<G>(chain, tiles, width);
      step += run;
    } while (step < product.run);
  }
}

// Parts of a long segment are as even as they can be, since a short chain costs as much at its end as a long one.
inline void set_chains(Product& product) {
  const Size run = product.run, parts = larger(1, (run + chain_length / 2) / chain_length);
  product.chain_run = parts == 1 ? run : (run + parts - 1) / parts;
  product.chain_segments = product.segments == 1 || run >= chain_length ? 1 : chain_length / larger(1, run);
}

// The whole product.
template <int G>
void multiply(Product product) {
  if (product.rows == 0) return;
  set_chains(product);
  const Size tiles = (product.rows + most_rows<G> - 1) / most_rows<G>;
  const Size tallest = tiles == 1 ? product.rows : (product.rows + tiles - 1) / tiles;
  Size width = most_panels(G, static_cast<int>(tallest));
  const auto vectors = product.vectors.data, start = product.start.data;
  const auto sums = product.sums.data;
  for (Size done = 0; done < product.panels; done += width) {
    while (width > product.panels - done) width /= 2;
    const Size first = product.descending ? product.panels - done - width : done;
    product.vectors.data = vectors + first * product.vectors.panel;
    product.sums.data = sums + first * product.sums.panel;
    if (start) product.start.data = start + first * product.start.panel;
    // With one tile each weight is used once: nothing to keep in the first cache.
    product.next = {reinterpret_cast<const char*>(product.vectors.data), 0};
    if (tiles == 1)
      multiply_tiles<G>(product, 1, product.rows, width);
    else
      multiply_chains<G>(product, tiles, width);
  }
}

}  // namespace gatewise::GATEWISE_KERNEL
