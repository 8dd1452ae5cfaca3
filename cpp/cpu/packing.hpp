// Packs PyTorch's matrices into panels, and unpacks panels. Weights are packed once when they change; backward
// transposes panels, and unpacks the gradients of weights, which are computed in panels.
#pragma once

#include "../core/contract.hpp"
#include "panel.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Hands out pieces of one block of memory, each aligned to a cache line. With a null base it only counts, so that one
// piece of code both finds the size of a block and uses it.
struct Arena {
  Real* base;
  Size used = 0;

  Real* take(Size count) {
    constexpr Size line = 64 / sizeof(Real);
    Real* piece = base ? base + used : nullptr;
    used += (count + line - 1) / line * line;
    return piece;
  }
};

// The packed weights of a layer and direction, or their gradients.
template <class Cell>
struct Panels {
  Real* input;       // [panel of H][I][gate][lane]
  Real* hidden;      // [panel of H][R][gate][lane]
  Real* bias;        // [panel of H][sum][lane]
  Real* projection;  // [panel of P][H][lane]
  Real* peephole;    // [panel of H][i f o][lane]; null: none

  Panels(Arena& arena, const Layer& layer) {
    const Size panels = panels_of(layer.hidden);
    input = arena.take(panels * layer.input * Cell::gates * lanes);
    hidden = arena.take(panels * output_of(layer) * Cell::gates * lanes);
    bias = arena.take(panels * Cell::sums * lanes);
    projection = arena.take(panels_of(layer.projection) * layer.hidden * lanes);
    peephole = layer.formula && layer.formula->peepholes ? arena.take(panels * 3 * lanes) : nullptr;
  }
};

// The panels of a layer that has been packed.
template <class Cell>
Panels<Cell> packed_panels(const Layer& layer) {
  Arena arena{const_cast<Real*>(static_cast<const Real*>(layer.packed))};
  return Panels<Cell>(arena, layer);
}

// A square of `lanes` by `lanes` elements, transposed. Only `rows` by `columns` elements of the source are read, those
// of row i at row_at(i); the others are zero.
struct Square {
  Register row[lanes];

  template <class RowAt>
  GATEWISE_INLINE Square(const RowAt& row_at, Size rows, Size columns) {
    Eigen::internal::PacketBlock<Register::Packet, lanes> block;
    for (Size i = 0; i < lanes; ++i)
      block.packet[i] = (i < rows ? load_first(row_at(i), columns) : Register::broadcast(0)).packet;
    Eigen::internal::ptranspose(block);
    for (Size i = 0; i < lanes; ++i) row[i] = block.packet[i];
  }
  GATEWISE_INLINE Square(const Real* data, Size stride, Size rows, Size columns)
      : Square([=](Size i) GATEWISE_LAMBDA { return data + i * stride; }, rows, columns) {}
};

// Prefetches what a walk over squares soon reads: `count` rows, `stride` apart, which are more rows than a processor
// prefetches itself. They go into L2, since rows a power of two apart would displace each other in the
// first. (With it, packing and unpacking H 512 and 650 takes half of the time with AVX-512, three quarters with AVX2.)
constexpr Size elements_ahead = 4 * 64 / sizeof(Real);
GATEWISE_INLINE void prefetch_rows(const Real* first, Size stride, Size count) {
  for (Size i = 0; i < count; ++i) __builtin_prefetch(first + i * stride, 0, 2);
}

// Rows first ... first + units of matrix [rows, columns] -> one gate of a panel [columns][gate][lane].
inline void pack_panel(const Real* matrix, Size columns, Size first, Size units, int gates, int gate, Real* panel) {
  for (Size k = 0; k < columns; k += lanes) {
    const Size count = smaller(lanes, columns - k), step = gates * lanes;
    const Real* const rows = matrix + first * columns + k;
    Real* const out = panel + k * step + gate * lanes;
    prefetch_rows(rows + elements_ahead, columns, units);
    prefetch_rows(out + elements_ahead * step, step, lanes);
    const Square square(rows, columns, units, count);
    for (Size i = 0; i < count; ++i) square.row[i].store(out + i * step);
  }
}

template <class Cell>
void pack_weights(const Layer& layer, const Weights& weights, Real* packed) {
  Arena arena{packed};
  const Panels<Cell> panels(arena, layer);
  const Size hidden = layer.hidden, recurrent = output_of(layer);
  const auto real = [](const void* pointer) { return static_cast<const Real*>(pointer); };
  for (Size panel = 0; panel < panels_of(hidden); ++panel) {
    const Size units = units_in(panel, hidden);
    const auto first_row = [&](int gate) { return gate * hidden + panel * lanes; };
    for (int slot = 0; slot < Cell::gates; ++slot) {
      pack_panel(real(weights.weight_ih), layer.input, first_row(Cell::input_gate(slot)), units, Cell::gates, slot,
                 panels.input + panel * layer.input * Cell::gates * lanes);
      pack_panel(real(weights.weight_hh), recurrent, first_row(Cell::hidden_gate(slot)), units, Cell::gates, slot,
                 panels.hidden + panel * recurrent * Cell::gates * lanes);
    }
    // Sums of both products start from both biases, GRU's two sums of n from one bias each.
    Real* bias = panels.bias + panel * Cell::sums * lanes;
    for (Size i = 0; i < Cell::sums * lanes; ++i) bias[i] = 0;
    for (int slot = 0; slot < Cell::gates; ++slot)
      for (Size lane = 0; lane < units; ++lane) {
        if (weights.bias_ih)
          bias[(Cell::first_input_sum + slot) * lanes + lane] +=
              real(weights.bias_ih)[first_row(Cell::input_gate(slot)) + lane];
        if (weights.bias_hh)
          bias[(Cell::first_hidden_sum + slot) * lanes + lane] +=
              real(weights.bias_hh)[first_row(Cell::hidden_gate(slot)) + lane];
      }
    for (Size i = 0; i < 3 && panels.peephole; ++i)
      load_first(real(weights.weight_ch) + i * hidden + panel * lanes, units)
          .store(panels.peephole + (panel * 3 + i) * lanes);
  }
  for (Size panel = 0; panel < panels_of(layer.projection); ++panel)
    pack_panel(real(weights.weight_hr), hidden, panel * lanes, units_in(panel, layer.projection), 1, 0,
               panels.projection + panel * hidden * lanes);
}

// Transposes panels [panel of units][k][gate][lane of units] for the product with gradients, into
// [panel of k][panel of units][gate][lane of units][lane of k], for the panels of k in `share`.
template <class Share>
void transpose(const Real* panels, Size units, Size depth, int gates, const Share& share, Real* transposed) {
  const Size count = panels_of(units);
  for (Size k_panel = share.begin; k_panel < share.end; ++k_panel)
    for (Size panel = 0; panel < count; ++panel)
      for (int gate = 0; gate < gates; ++gate) {
        const Real* const rows = panels + ((panel * depth + k_panel * lanes) * gates + gate) * lanes;
        Real* const out = transposed + ((k_panel * count + panel) * gates + gate) * lanes * lanes;
        prefetch_rows(rows + depth * gates * lanes, gates * lanes, lanes);
        prefetch_rows(out + gates * lanes * lanes, lanes, lanes);
        const Square square(rows, gates * lanes, units_in(k_panel, depth), lanes);
        for (Size i = 0; i < lanes; ++i) square.row[i].store(out + i * lanes);
      }
}

// One gate of a panel [columns][gate][lane] -> rows first ... first + units of matrix [rows, columns].
inline void unpack_panel(const Real* panel, Size columns, Size first, Size units, int gates, int gate, Real* matrix) {
  for (Size k = 0; k < columns; k += lanes) {
    const Size count = smaller(lanes, columns - k), step = gates * lanes;
    const Real* const rows = panel + k * step + gate * lanes;
    Real* const out = matrix + first * columns + k;
    prefetch_rows(rows + elements_ahead * step, step, lanes);
    prefetch_rows(out + elements_ahead, columns, units);
    const Square square(rows, step, count, lanes);
    for (Size unit = 0; unit < units; ++unit) store_first(square.row[unit], out + unit * columns, count);
  }
}

// Unpacks the panels of hidden units in `share`, and those of the projection in `projection_share`.
template <class Cell, class Share>
void unpack_gradients(const Layer& layer, const Panels<Cell>& panels, const Gradients& gradients, const Share& share,
                      const Share& projection_share) {
  const Size hidden = layer.hidden, recurrent = output_of(layer);
  const auto real = [](void* pointer) { return static_cast<Real*>(pointer); };
  for (Size panel = share.begin; panel < share.end; ++panel) {
    const Size units = units_in(panel, hidden);
    const Real* bias = panels.bias + panel * Cell::sums * lanes;
    for (int slot = 0; slot < Cell::gates; ++slot) {
      const Size input_row = Cell::input_gate(slot) * hidden + panel * lanes;
      const Size hidden_row = Cell::hidden_gate(slot) * hidden + panel * lanes;
      unpack_panel(panels.input + panel * layer.input * Cell::gates * lanes, layer.input, input_row, units, Cell::gates,
                   slot, real(gradients.weight_ih));
      unpack_panel(panels.hidden + panel * recurrent * Cell::gates * lanes, recurrent, hidden_row, units, Cell::gates,
                   slot, real(gradients.weight_hh));
      const auto unpack_bias = [&](int sum, Real* out) {
        if (out) store_first(Register::load(bias + sum * lanes), out, units);
      };
      unpack_bias(Cell::first_input_sum + slot, gradients.bias_ih ? real(gradients.bias_ih) + input_row : nullptr);
      unpack_bias(Cell::first_hidden_sum + slot, gradients.bias_hh ? real(gradients.bias_hh) + hidden_row : nullptr);
    }
  }
  for (Size panel = projection_share.begin; panel < projection_share.end; ++panel)
    unpack_panel(panels.projection + panel * hidden * lanes, hidden, panel * lanes, units_in(panel, layer.projection),
                 1, 0, real(gradients.weight_hr));
}

}  // namespace gatewise::GATEWISE_KERNEL
