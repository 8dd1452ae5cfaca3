// A network on only the last inputs: each step gives what a call on them gives, from a state of zero.
#pragma once

#include <vector>

#include "memory.hpp"
#include "network.hpp"

namespace gatewise {

class Window {
 public:
  // head: the nodes before the first one that needs time, null if there are none; rest: the other nodes, of which one
  // takes the last step. Both must outlive the window.
  Window(const Network* head, const Network& rest, Size steps, Size batch);

  // Takes over the inputs of a window that differs only in its weights.
  void take_inputs(const Window& other);

  // Advances every row by some steps: x [T, B, I] or tokens [T, B]; output [T, B, O]; resets [T, B], null if there are
  // none. If interrupted, the window stays as it was.
  Status operator()(const NetworkInput& input, Rows<void*> output, Size steps, const std::uint8_t* resets,
                    Interrupt* interrupt);
  void forget(Size row) { counts_[static_cast<std::size_t>(row)] = 0; }

  Size steps() const { return steps_; }
  // How many inputs a row has, at most `steps`, and where its last one (1), its second last one (2), ... lies.
  Size count(Size row) const { return counts_[static_cast<std::size_t>(row)]; }
  const void* input(Size row, Size last) const { return input_at(slot(last), row); }
  Size input_bytes() const { return input_bytes_; }
  // Stores the next inputs of all rows, [B, I] whose rows are this many bytes apart, and computes nothing else.
  void remember(const void* inputs, Size row_bytes);

 private:
  Size slot(Size last) const { return (next_ + steps_ - last) % steps_; }
  char* input_at(Size slot, Size row) const {
    return static_cast<char*>(inputs_.data()) + (slot * batch_ + row) * input_bytes_;
  }
  Size part_bytes(const StatePart& part) const { return lines(part.count * part.units * batch_ * rest_->item()); }
  bool first_is_recurrent() const { return rest_->nodes.front().kind == Node::Kind::recurrent; }
  void lay_out_rest(Size steps, const Schedule& schedule);
  void make_features(Size slot);
  Status step(Rows<void*> output, Interrupt* interrupt);
  void save_inputs();
  void restore_inputs(Size steps);

  const Network *head_, *rest_;
  Size steps_, batch_, input_bytes_;
  Size features_, feature_bytes_;  // units and bytes of what the rest reads for each input
  Size next_ = 0;                  // the slot of the next input
  std::vector<Size> counts_;       // [B]
  Buffer inputs_, feature_rows_;   // [steps, B, I], [steps, B, F]
  Size operations_;                // multiply-adds of one step with a full window
  Size saved_next_ = 0;            // these three: from before a call that may be interrupted
  std::vector<Size> saved_counts_;
  Buffer saved_inputs_;
  Buffer sums_[2];   // [steps, B, sums of the first layer], each direction
  Buffer gathered_;  // [steps, B, F] in the order of time; or tokens [steps, B]
  Buffer scratch_, head_scratch_;
  Buffer state_;
  std::vector<void*> state_after_;  // of a call; it is never read
  std::vector<std::int64_t> places_;
  ScheduleMemory schedule_memory_;
  Run run_, head_run_;
  Size laid_out_steps_ = 0;  // of run_ if it has no schedule, else 0
};

}  // namespace gatewise
