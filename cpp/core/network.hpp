// Whole networks: recurrent layers and the nodes around them, one after the other, over the table of one backend. Knows
// neither Eigen nor Python, and allocates nothing once a run is laid out.
#pragma once

#include <vector>

#include "schedule.hpp"

namespace gatewise {

struct Node {
  enum class Kind {
    mask,  // first node only: steps whose input is one value everywhere are left out, and their output is zero
    lookup,
    recurrent,
    rows,
    convolution,
    reverse,  // the last step of each row comes first; not with resets
    last,
  };

  Kind kind;
  Size input, output;           // units of a row before and after the node; lookup: rows of its table, units
  double masked{};              // mask: the value, or the token
  Stack stack{};                // recurrent
  RowFunction function{};       // rows; convolution: of its taps one after the other
  Size taps = 1, dilation = 1;  // convolution: reads the times t - left, t - left + dilation, ...
  Size left = 0;
  bool in_time = false;         // last, in a window: output zero if the current step is masked
  bool both_ends = false;       // last: the second half of a row is of the reverse direction, whose last step is time 0
  const void* table = nullptr;  // lookup: [input, output]

  bool is_causal() const { return left == (taps - 1) * dilation; }
};

// A part of the state, [count, B, units].
struct StatePart {
  Size count, units;
};

struct Network {
  const Kernels* kernels;
  std::vector<Node> nodes;
  // Embedding directly before a recurrent layer: the layer's input products for every token, a table for each
  // direction. A step looks these up instead of multiplying.
  const void* sums[2] = {};

  Size item() const { return kernels->item_bytes; }
  bool masks() const { return nodes.front().kind == Node::Kind::mask; }
  std::size_t first() const { return masks(); }  // the node that reads the input
  bool takes_tokens() const { return nodes.size() > first() && nodes[first()].kind == Node::Kind::lookup; }
  bool masks_or_reverses() const;
  Size input() const { return nodes.front().input; }
  Size output() const { return nodes.back().output; }
  std::vector<StatePart> parts() const;
  Size operations(Size rows) const;  // multiply-adds of one step, or other work that takes as long
};

Size operations_of(const Stack& stack, Size batch);  // a step
int threads_of(const Kernels& kernels, const Stack& stack, Size steps, Size batch);

// What a run reads: rows, or a token for each row and step.
struct NetworkInput {
  Rows<const void*> rows;      // [T, B, I]
  const std::int64_t* tokens;  // [T, B]; for a network that takes them, or in place of the first layer's input
};

// A network laid out for some steps of some rows.
class Run {
 public:
  // max_threads 0: as many as pay. looked_up: tables of the first node, which is recurrent, from which its input
  // products are looked up.
  void lay_out(const Network& network, Size steps, Size batch, const Schedule& schedule, int max_threads,
               const void* const* looked_up = nullptr);
  Size bytes() const { return bytes_; }
  // Gives the run memory of `bytes()`, aligned to 64, and the parts of the state before and after, which may be the
  // same. before: null for a state of zero; null in it for a part of zero.
  void place(void* memory, const void* const* before, void* const* after);
  // If interrupted, output and state after are undefined.
  Status operator()(const NetworkInput& input, Rows<void*> output, Interrupt* interrupt);

 private:
  struct Piece {
    const Node* node;
    Size steps;
    int threads;
    Forward forward;     // recurrent
    Size scratch;        // bytes
    Size block;          // convolution: rows that are gathered at a time
    const void* before;  // convolution: what came before, [left, B, I]; null: zero
    void* after;
    int part;  // the first of its parts of the state
  };

  Status run(const NetworkInput& input, Rows<void*> output);
  void use(const Schedule& schedule, Size steps);
  Status run_masked(const NetworkInput& input, Rows<void*> output);
  bool find_masked(const NetworkInput& input);
  NetworkInput without_masked(const NetworkInput& input);
  void put_back(Rows<void*> output) const;
  void clear_masked_ends(Rows<void*> output) const;
  void look_up(const Node& node, const std::int64_t* tokens, Rows<void*> to) const;
  void convolve(const Piece& piece, Rows<const void*> from, Rows<void*> to);
  void keep_history(const Piece& piece, Rows<const void*> from) const;
  void reverse(const Piece& piece, Rows<const void*> from, Rows<void*> to) const;
  void take_last(const Piece& piece, Rows<const void*> from, Rows<void*> to) const;
  void clear_after_ends(Size units, Rows<void*> rows) const;
  void apply(const Piece& piece, Size steps, Size batch, Rows<const void*> from, Rows<void*> to) const;
  const char* row_at(const Piece& piece, Rows<const void*> from, Size at, Size row) const;
  void find_restarts();
  bool is_asked_at(Size time, Size row_bytes) const;
  // Whether the state of a row starts anew between two times. `from` may lie before this call.
  bool separated(Size from, Size to, Size row) const { return restarts_ && restarts_[to * batch_ + row] > from; }
  Size end(Size row) const { return schedule_.row_lengths ? schedule_.row_lengths[row] : steps_; }

  const Kernels* kernels_ = nullptr;
  std::vector<Piece> pieces_;
  Size steps_ = 0, batch_ = 0, item_ = 0, bytes_ = 0;
  Size buffers_in_all_ = 0, buffer_ = 0, gathered_ = 0, zeros_ = 0,
       restart_bytes_ = 0;  // in bytes, except buffers_in_all_, a count
  Schedule schedule_{};
  Interrupt* interrupt_ = nullptr;
  bool looks_up_ = false, ends_with_time_ = true;
  Size* restarts_ = nullptr;  // [T, B] the last time so far at which the state starts anew; null: never
  const Node* mask_ = nullptr;
  bool ends_in_time_ = false;
  Schedule given_schedule_{};       // of the caller
  Size max_steps_ = 0;              // for which it was laid out
  ScheduleMemory schedule_memory_;  // of the steps that are not masked
  std::vector<Size> kept_lengths_;  // [B] how many steps of each row are not masked
  Size kept_bytes_ = 0, kept_input_bytes_ = 0, kept_output_bytes_ = 0;
  std::uint8_t* kept_ = nullptr;                         // [T, B] 1: not masked
  char *kept_input_ = nullptr, *kept_output_ = nullptr;  // [T, B, .] without gaps
  char *buffers_[2] = {}, *scratch_ = nullptr, *gathered_rows_ = nullptr, *zero_row_ = nullptr;
};

}  // namespace gatewise
