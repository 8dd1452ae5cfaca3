// Functions of single rows: the operations around recurrent layers.
//
// The bits of a row depend on nothing but the row: products have their fixed order, and sums over a row are made lane
// by lane, panel after panel, before the lanes are added in their order.
#pragma once

#include "activate.hpp"
#include "packing.hpp"
#include "threads.hpp"

namespace gatewise::GATEWISE_KERNEL {

// Rows that share one pass over the weights of a dense layer, and bytes of the sums between their product and the
// activation: what stays in L1.
constexpr Size dense_rows = 96;
constexpr Size dense_bytes = 16 * 1024;

// What a row function reads in addition to its input: [panel][lane], except for the weights.
struct RowPanels {
  Real* weights = nullptr;  // dense: [panel of O][I][lane]
  Real* values[3] = {};     // dense: bias; normalize: mean, scale, shift; layer_norm: scale, shift

  RowPanels(Arena& arena, const RowFunction& function) {
    const Size panels = panels_of(function.output);
    if (function.operation == Operation::dense) weights = arena.take(panels * function.input * lanes);
    for (int i = 0; i < values_of(function.operation); ++i) values[i] = arena.take(panels * lanes);
  }
  static int values_of(Operation operation) {
    return operation == Operation::dense        ? 1
           : operation == Operation::normalize  ? 3
           : operation == Operation::layer_norm ? 2
                                                : 0;
  }
};

inline void pack_row_function(const RowFunction& function, const void* const* weights, Real* packed) {
  Arena arena{packed};
  const RowPanels panels(arena, function);
  const Size units = function.output;
  const auto matrices = reinterpret_cast<const Real* const*>(weights);
  const bool dense = function.operation == Operation::dense;
  for (Size panel = 0; panel < panels_of(units); ++panel) {
    const Size first = panel * lanes, count = units_in(panel, units);
    if (dense)
      pack_panel(matrices[0], function.input, first, count, 1, 0, panels.weights + panel * function.input * lanes);
    for (int i = 0; i < RowPanels::values_of(function.operation); ++i) {
      const Real* values = matrices[dense ? 1 : i];
      const bool scales = function.operation == Operation::layer_norm && i == 0;
      (values ? load_first(values + first, count) : Register::broadcast(scales ? 1 : 0))
          .store(panels.values[i] + first);
    }
  }
}

// How many rows and panels of a dense layer are computed at a time, and their sums.
struct DenseScratch {
  Size rows, panels;
  Real* sums;  // [panel][row][lane]

  DenseScratch(Arena& arena, const RowFunction& function, Size max_rows)
      : rows(larger(1, smaller(max_rows, dense_rows))) {
    const Size all = panels_of(function.output), row = rows * lanes, fitting = dense_bytes / Size(sizeof(Real));
    panels = smaller(all, larger(1, fitting / row));
    sums = arena.take(smaller(all * row, larger(row, fitting)));  // also enough for fewer rows
  }
};

// Calls body(unit, count) for each register of a row: its first unit, and how many of its lanes belong to the row.
template <class Body>
GATEWISE_INLINE void each_register(Size units, const Body& body) {
  for (Size unit = 0; unit < units; unit += lanes) body(unit, smaller(lanes, units - unit));
}

// Computes the sums s.sums [panel][row][lane] of a dense layer block by block, and calls body(first row, rows, first
// panel, panels) for each.
template <class Body>
void each_dense_block(const RowFunction& function, const RowPanels& packed, Size rows, const Real* input,
                      Size input_row, const DenseScratch& s, const Body& body) {
  const Size panels = panels_of(function.output), depth = function.input;
  for (Size row = 0; row < rows; row += s.rows)
    for (Size panel = 0; panel < panels; panel += s.panels) {
      const Size row_count = smaller(s.rows, rows - row), panel_count = smaller(s.panels, panels - panel);
      multiply<1>({
          .rows = row_count,
          .panels = panel_count,
          .run = depth,
          .scalars = {.data = input + row * input_row, .row = input_row},
          .vectors = {.data = packed.weights + panel * depth * lanes, .panel = depth * lanes, .step = lanes},
          .start = {.data = packed.values[0] + panel * lanes, .panel = lanes},
          .sums = {.data = s.sums, .panel = row_count * lanes, .row = lanes},
      });
      body(row, row_count, panel, panel_count);
    }
}

// Softmax in place: exp(x - greatest x) divided by the sum of these.
inline void softmax(Real* row, Size units) {
  constexpr Real infinity = __builtin_inf();
  const auto load = [&](Size unit, Size count) {
    Real padded[lanes];
    for (Size lane = 0; lane < lanes; ++lane) padded[lane] = lane < count ? row[unit + lane] : -infinity;
    return Register::load(padded);
  };
  Real lane_values[lanes], greatest = -infinity, total = 0;
  Register most = Register::broadcast(-infinity), sum = Register::broadcast(0);
  each_register(units, [&](Size unit, Size count) { most = maximum(load(unit, count), most); });
  most.store(lane_values);
  for (const Real value : lane_values) greatest = value > greatest ? value : greatest;
  each_register(units, [&](Size unit, Size count) {
    const Register value = exp(load(unit, count) - Register::broadcast(greatest));
    sum = sum + value;
    store_first(value, row + unit, count);
  });
  sum.store(lane_values);
  for (const Real value : lane_values) total = total + value;
  each_register(units, [&](Size unit, Size count) {
    store_first(load_first(row + unit, count) / Register::broadcast(total), row + unit, count);
  });
}

// The mean over the row of value(unit, count), whose lanes from `count` on are zero.
template <class Value>
GATEWISE_INLINE Real mean_of(Size units, const Value& value) {
  Register sum = Register::broadcast(0);
  each_register(units, [&](Size unit, Size count) GATEWISE_LAMBDA { sum = sum + value(unit, count); });
  Real lane_values[lanes], total = 0;
  sum.store(lane_values);
  for (const Real value : lane_values) total = total + value;
  return total / Real(units);
}

inline void normalize_row(const RowPanels& packed, Real epsilon, Size units, const Real* input, Real* output) {
  const Register mean = Register::broadcast(
      mean_of(units, [&](Size unit, Size count) GATEWISE_LAMBDA { return load_first(input + unit, count); }));
  const auto distance = [&](Size unit, Size count)
                            GATEWISE_LAMBDA { return only_first(load_first(input + unit, count) - mean, count); };
  const Real variance = mean_of(units, [&](Size unit, Size count) GATEWISE_LAMBDA {
    const Register value = distance(unit, count);
    return value * value;
  });
  const Register deviation = Register::broadcast(sizeof(Real) == 4 ? Real(__builtin_sqrtf(float(variance + epsilon)))
                                                                   : Real(__builtin_sqrt(double(variance + epsilon))));
  each_register(units, [&](Size unit, Size count) GATEWISE_LAMBDA {
    const Register scale = Register::load(packed.values[0] + unit), shift = Register::load(packed.values[1] + unit);
    store_first(fused(distance(unit, count) / deviation, scale, shift), output + unit, count);
  });
}

// Applies the function to some rows, on one thread.
inline void apply_to_rows(const RowFunction& function, Size rows, const Real* input, Size input_row, Real* output,
                          Size output_row, Real* scratch) {
  Arena packed_arena{const_cast<Real*>(static_cast<const Real*>(function.packed))}, arena{scratch};
  const RowPanels packed(packed_arena, function);
  const Size units = function.output;
  const bool ends_with_softmax = function.function.activation == Activation::softmax;
  const Function of_unit = ends_with_softmax ? Function{Activation::linear, 0, 0} : function.function;
  const auto each_row = [&](const auto& body) {
    for (Size row = 0; row < rows; ++row) body(input + row * input_row, output + row * output_row);
  };
  const auto halves = [&](const auto& join) {
    each_row([&](const Real* from, Real* to) {
      each_register(units, [&](Size unit, Size count) {
        store_first(join(load_first(from + unit, count), load_first(from + units + unit, count)), to + unit, count);
      });
    });
  };
  switch (function.operation) {
    case Operation::dense: {
      const DenseScratch s(arena, function, rows);
      with_activation(of_unit, [&](const auto& activation) {
        each_dense_block(function, packed, rows, input, input_row, s,
                         [&](Size first_row, Size row_count, Size first_panel, Size panel_count) {
                           for (Size panel = 0; panel < panel_count; ++panel) {
                             const Size unit = (first_panel + panel) * lanes,
                                        count = units_in(first_panel + panel, units);
                             const Real* sums = s.sums + panel * row_count * lanes;
                             Real* to = output + first_row * output_row + unit;
                             for (Size row = 0; row < row_count; ++row, sums += lanes, to += output_row)
                               store_first(activation(Register::load(sums)), to, count);
                           }
                         });
      });
      break;
    }
    case Operation::activate:
      with_activation(of_unit, [&](const auto& activation) {
        each_row([&](const Real* from, Real* to) {
          each_register(units, [&](Size unit, Size count) {
            store_first(activation(load_first(from + unit, count)), to + unit, count);
          });
        });
      });
      break;
    case Operation::normalize:
      each_row([&](const Real* from, Real* to) {
        each_register(units, [&](Size unit, Size count) {
          const auto value = [&](int i) { return Register::load(packed.values[i] + unit); };
          store_first(fused(load_first(from + unit, count) - value(0), value(1), value(2)), to + unit, count);
        });
      });
      break;
    case Operation::layer_norm:
      each_row([&](const Real* from, Real* to) { normalize_row(packed, Real(function.epsilon), units, from, to); });
      break;
    case Operation::add:
      return halves([](Register a, Register b) { return a + b; });
    case Operation::multiply:
      return halves([](Register a, Register b) { return a * b; });
    case Operation::average:
      return halves([](Register a, Register b) { return (a + b) * Register::broadcast(Real(0.5)); });
  }
  if (ends_with_softmax) each_row([&](const Real*, Real* to) { softmax(to, units); });
}

inline Size row_function_scratch(const RowFunction& function, Size rows) {
  Arena arena{nullptr};
  if (function.operation == Operation::dense) DenseScratch(arena, function, rows);
  return arena.used;
}

}  // namespace gatewise::GATEWISE_KERNEL
