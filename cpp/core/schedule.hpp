// Makes schedules of rows of different lengths.
#pragma once

#include <vector>

#include "contract.hpp"

namespace gatewise {

// Owns what a Schedule points to.
class ScheduleMemory {
 public:
  // Makes room for at most this many steps. Allocates only where there was never that much room.
  void resize(Size steps, Size batch);
  // lengths: [B] number of steps of each row, `steps` is the largest. Allocates nothing.
  Schedule make(const Size* lengths, Size steps);
  // A schedule of these sizes whose arrays are not filled in: to find out how much memory a call needs.
  Schedule unfilled() const;

 private:
  std::vector<Size> order_, sorted_lengths_, row_lengths_, active_, rows_before_;
};

}  // namespace gatewise
